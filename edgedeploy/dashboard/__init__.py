"""A local, read-only page over the history's store: verdicts, trends, devices and their state."""
