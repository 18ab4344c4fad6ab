"""pycuda, emulated: as much of its driver module as a session uses, on the emulated CUDA."""
