"""Studies: methods compared at matched updates and matched compute, with tables, figures and a page of text."""
