"""Incidents and outcomes in, commands out. Pure: no clock, no file, no socket, no torch."""
