"""Plan a run before it starts: memory of a rank and floating-point operations, counted on the meta device."""
