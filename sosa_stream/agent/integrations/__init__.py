"""Callbacks of trainers, for scripts that are not started by ``python -m sosa_stream.agent``."""
