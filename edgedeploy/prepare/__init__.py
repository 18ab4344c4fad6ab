"""Room 1: a PyTorch or ONNX model becomes canonical fp32 ONNX, a quantization table and each back end's int8 form."""
