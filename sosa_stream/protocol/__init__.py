"""What travels between training ranks and the daemon: messages, their bytes, and the channels that carry them."""
