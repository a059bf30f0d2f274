"""To the daemon and back: what this process sends, and the thread that does everything that may wait."""
