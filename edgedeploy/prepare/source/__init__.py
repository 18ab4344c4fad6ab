"""What a quantized source carries: read out of its graph, carried through clean-up, proven and traced."""
