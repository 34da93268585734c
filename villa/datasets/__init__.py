"""Data sets, their stores, and the way from examples to batches and updates."""

import os

# Arrow's own allocator keeps tens of MiB of what has been freed.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
