"""What runs inside a training process: it watches, publishes, and applies agreed fixes."""
