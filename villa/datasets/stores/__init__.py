"""Where region features come from: a network's grid with a cache on disk, or a user's own files."""
