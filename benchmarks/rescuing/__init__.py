"""The rescue benchmark's parts: programs, faults, cases, arms, the two ranks that train, and who judges."""
