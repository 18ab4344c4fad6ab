"""Writes the form that a back end wants of a model: the canonical pair and a target's rules, in one .onnx."""
