"""The optimizer step in this process: hooks around it, and what must not reach the weights kept from them."""
