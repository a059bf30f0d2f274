"""A batch that does not fit into memory, run in parts with the same gradient."""
