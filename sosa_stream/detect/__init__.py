"""Frames in, incidents out. Pure: no clock, no file, no socket, no torch."""
