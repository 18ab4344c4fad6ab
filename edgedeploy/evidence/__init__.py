"""The evidence bundle: a release, what was measured of it, and who says so, in one signed file."""
