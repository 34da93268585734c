"""Data sets on LXMERT's files."""
