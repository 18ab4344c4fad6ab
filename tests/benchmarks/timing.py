"""How benchmarks time artifacts beside each other: one thread, one call of each in turn."""

import time

import numpy as np


def session(path):
    """Return an artifact as a device would run it: one thread, everything optimised."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def medians_s(calls, *, rounds, warm_up):
    """Return the median seconds of each call over the rounds after the first `warm_up`, alternating one by one."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(values[warm_up:])) for name, values in times.items()}
