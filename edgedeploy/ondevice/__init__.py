"""What runs on the device: one file that imports nothing of ours, and that nobody imports."""
