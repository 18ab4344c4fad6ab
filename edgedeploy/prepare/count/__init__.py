"""Counts what compression a graph carries, and compares that with what was promised."""
