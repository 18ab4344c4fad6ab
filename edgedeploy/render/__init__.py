"""Room "render": records in, text out. Pure: no clock, no randomness, no I/O but reading its own template."""
