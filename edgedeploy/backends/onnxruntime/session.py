"""The device half of ONNX Runtime: CPU, one InferenceSession, plain `run`."""

import json
import os
import statistics
import tempfile

import numpy as np
import onnxruntime

# ONNX Runtime's name of a tensor type -> ours (numpy knows ours by the same name).
DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(int16)": "int16", "tensor(int8)": "int8", "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}  # fmt: skip


class Session:
    """One loaded artifact.

    Options: threads (default 1), allow_spinning (default True: idle threads of the pool spin, which is faster and
    costs CPU time).
    """

    runtime = "onnxruntime " + onnxruntime.__version__

    def __init__(self, artifact, options):
        self._threads = int(options.get("threads", 1))
        self._spins = bool(options.get("allow_spinning", True))
        self._artifact = artifact
        self._session = self._opened(self._settings())
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self._names = [node.name for node in self._session.get_outputs()]
        self._feeds = self._results = None

    def _settings(self):
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self._threads
        settings.inter_op_num_threads = 1
        settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._spins else "0")
        return settings

    def _opened(self, settings):
        return onnxruntime.InferenceSession(self._artifact, settings, providers=["CPUExecutionProvider"])

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._session = self._feeds = self._results = None

    def boundary(self):
        spinning = "spinning" if self._spins else "not spinning"
        return {
            # Inputs are used where bind put them; outputs are allocated and handed over as arrays by every run.
            "includes_input_copy": False,
            "includes_output_copy": True,
            "threads": self._threads,
            "detail": "InferenceSession.run, CPUExecutionProvider, sequential, threads " + spinning,
        }

    def bind(self, inputs):
        if set(inputs) != set(self._inputs):
            raise ValueError("the model takes the inputs %s, not %s" % (sorted(self._inputs), sorted(inputs)))
        feeds = {}
        for name, (data, dtype, shape) in inputs.items():
            node = self._inputs[name]
            if DTYPES.get(node.type) != dtype:
                raise ValueError("input %r takes %s, not %s" % (name, DTYPES.get(node.type, node.type), dtype))
            want = list(node.shape)
            if len(want) != len(shape) or any(isinstance(n, int) and n != got for n, got in zip(want, shape)):
                raise ValueError("input %r takes the shape %s, not %s" % (name, want, list(shape)))
            feeds[name] = np.frombuffer(data, dtype=dtype).reshape(shape).copy()
        self._feeds = feeds

    def infer(self):
        self._results = self._session.run(None, self._feeds)

    def outputs(self):
        return {
            name: (np.ascontiguousarray(array).tobytes(), array.dtype.name, list(array.shape))
            for name, array in zip(self._names, self._results)
        }

    def profile(self, runs=10):
        """Return [(node, operator, seconds)] in order, each the median of `runs` inferences.

        A session of its own computes them, in which ONNX Runtime notes when each node began and ended.

        Raises:
            RuntimeError: nothing is bound.
        """
        if self._feeds is None:
            raise RuntimeError("there are no inputs yet; bind them first")
        with tempfile.TemporaryDirectory(prefix="edgedeploy-") as folder:
            settings = self._settings()
            settings.enable_profiling = True
            settings.profile_file_prefix = os.path.join(folder, "profile")
            watched = self._opened(settings)
            for _ in range(runs):
                watched.run(None, self._feeds)
            with open(watched.end_profiling(), encoding="utf-8") as stream:
                events = json.load(stream)
        ending, times_us = "_kernel_time", {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(ending):
                node = event["name"][: -len(ending)], event["args"]["op_name"]
                times_us.setdefault(node, []).append(event["dur"])
        # What runs several times in an inference (in a loop, or under one name) takes its time as often.
        return [
            (name, kind, statistics.median(found) * len(found) / runs / 1e6) for (name, kind), found in times_us.items()
        ]
