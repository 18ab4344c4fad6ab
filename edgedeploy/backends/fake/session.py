"""The device half of the fake runtime; standard library only."""

import hashlib
import json
import os
import random
import signal
import struct
import time

CODES = {
    "float32": "f", "float16": "e", "float64": "d", "int64": "q", "int32": "i", "int16": "h", "int8": "b",
    "uint8": "B", "bool": "?",
}  # fmt: skip


def fits(shape, spec):
    """Say whether a shape is what a specification with named axes allows."""
    return len(shape) == len(spec) and all(isinstance(want, str) or want == got for got, want in zip(shape, spec))


def scores(sample, count, wrong_every):
    """Return `count` scores in [0, 1] for one sample's bytes; the class (sum of the bytes) % count gets 1.

    With `wrong_every`, samples whose digest is divisible by it are given to the next class instead.
    """
    digest = hashlib.sha256(sample).digest()
    best = sum(sample) % count
    if wrong_every and int.from_bytes(digest[:4], "little") % wrong_every == 0:
        best = (best + 1) % count
    return [1.0 if k == best else digest[k % 32] / 512 for k in range(count)]


class Session:
    """One loaded artifact."""

    runtime = "fake 1"

    def __init__(self, artifact, options):
        with open(artifact, encoding="utf-8") as stream:
            document = json.load(stream)
        if document.get("format") != "edgedeploy.fake/1":
            raise ValueError("not an artifact of the fake runtime")
        self.inputs, self.outputs_spec = document["inputs"], document["outputs"]
        self.options = dict(document["options"], **options)
        self.random = random.Random(0)  # noqa: S311 - wobble, not a secret
        self.inferences = 0
        self.leaked = []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.leaked.clear()

    def boundary(self):
        return {
            "includes_input_copy": False,
            "includes_output_copy": True,
            "threads": int(self.options["threads"]),
            "detail": "sleeps for duration_us" if self.options["is_idle"] else "busy-waits for duration_us",
        }

    def bind(self, inputs):
        if set(inputs) != set(self.inputs):
            raise ValueError("the artifact takes %s, not %s" % (sorted(self.inputs), sorted(inputs)))
        for name, (_, dtype, shape) in inputs.items():
            want_dtype, *want_shape = self.inputs[name]
            if dtype != want_dtype or not fits(shape, want_shape):
                raise ValueError("%s takes %s%s, not %s%s" % (name, want_dtype, want_shape, dtype, list(shape)))
        self.batch = next(iter(inputs.values()))[2][0]
        strides = {name: len(data) // self.batch for name, (data, _, _) in inputs.items()}
        self.samples = [
            b"".join(inputs[name][0][k * strides[name] : (k + 1) * strides[name]] for name in sorted(inputs))
            for k in range(self.batch)
        ]

    def infer(self):
        start_ns = time.perf_counter_ns()
        self.inferences += 1
        wobble = 1.0 + abs(self.random.gauss(0.0, self.options["wobble"]))
        end_ns = start_ns + self.options["duration_us"] * 1e3 * wobble
        if self.options["print_noise"]:
            os.write(1, b"[fake] printed from C, not a protocol line\n")
        for _ in range(self.options["flood_bytes"] >> 16):
            os.write(1, b"~" * (1 << 16))
        if self.inferences == self.options["crash_after"]:
            os.kill(os.getpid(), signal.Signals[self.options["crash_signal"]])
        if self.inferences == self.options["hang_after"]:
            time.sleep(1e6)
        if self.options["leak_bytes"]:
            self.leaked.append(b"\x01" * self.options["leak_bytes"])
        if self.options["is_idle"]:
            time.sleep(max(0.0, (end_ns - time.perf_counter_ns()) / 1e9))
        while time.perf_counter_ns() < end_ns:
            pass

    def outputs(self):
        answers = {}
        for name, (dtype, *spec) in self.outputs_spec.items():
            row = [1 if isinstance(n, str) else n for n in spec[1:]]
            count = 1
            for n in row:
                count *= n
            is_float = dtype.startswith("float")
            values = []
            for sample in self.samples:
                answer = scores(sample, count, self.options["wrong_every"])
                values += answer if is_float else [round(score) for score in answer]
            data = struct.pack("<%d%s" % (len(values), CODES[dtype]), *values)
            answers[name] = (data, dtype, [self.batch, *row])
        return answers
