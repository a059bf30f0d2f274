"""A terminal over the daemon's HTTP API: the runs as they are, and keys for what people decide."""
