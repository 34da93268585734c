"""LXMERT's files."""
