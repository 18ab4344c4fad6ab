"""Records in, verdict out. Pure: no I/O, no clock, no unseeded randomness."""
