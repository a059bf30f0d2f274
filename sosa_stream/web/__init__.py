"""What the daemon serves over HTTP: metrics, its health, the runs, and what people and alerts ask for."""
