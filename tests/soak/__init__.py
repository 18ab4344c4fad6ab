"""The soak: random faults strike a small lab while a matrix is measured on it, and at the end the books must balance."""
