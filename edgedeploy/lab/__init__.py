"""Reaching a device: inventory, transports, what is shipped, and the conversation with the runner."""
