"""UNITER's task heads: one registered subclass of ``Uniter`` a file."""
