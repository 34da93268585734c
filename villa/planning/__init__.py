"""What a run will need before it starts: memory of a rank and floating point operations, counted without any data."""
