"""How all ranks agree on one tick at which they apply a command, or none does."""
