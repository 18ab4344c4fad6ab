"""Quantization after training: calibration, ranges, equalization, rounding, and which layers stay in float."""
