"""A child process of the TensorRT-RTX back end: parses one ONNX file and builds one engine.

Imports nothing of ours. The log is written line by line: what was said last is there even when the process dies.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import tensorrt_rtx as trt


class Log(trt.ILogger):  # type: ignore[misc]  # the runtime has no types
    """Writes every message to a file, the first letter of ERROR, WARNING, INFO or VERBOSE before it."""

    def __init__(self, file: TextIO) -> None:
        trt.ILogger.__init__(self)
        self._file = file

    def log(self, severity: Any, text: str) -> None:
        """Write one message."""
        self._file.write(f"[{severity.name.removeprefix('INTERNAL_')[0]}] {text}\n")


def parse(source: str, network: Any, log: Log) -> list[dict[str, str]]:
    """Parse an ONNX file into a network; return what the parser complains of."""
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(source):
        return []
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    found = [
        {"node": one.node_name(), "op": one.node_operator(), "code": one.code().name, "text": one.desc(),
         "function": one.func()}
        for one in errors
    ]  # fmt: skip
    return found or [{"node": "", "op": "", "code": "", "text": "it did not say why", "function": ""}]


def configuration(builder: Any, job: dict[str, Any]) -> Any:
    """Return a builder's configuration."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not job["tf32"]:
        # Set by default: products of float32 would be computed with 10 bits of mantissa.
        config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = len(job["compute_capabilities"])
    for index, name in enumerate(job["compute_capabilities"]):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in job["profiles"].items():
            profile.set_shape(name, shapes["min"], shapes["opt"], shapes["max"])
        config.add_optimization_profile(profile)
    return config


def main(job: dict[str, Any]) -> None:
    """Do a job, and write how it went as JSON.

    Args:
        job: source, engine, log, result: paths; compute_capabilities: names; profiles: input -> min, opt, max shape;
            tf32: whether float32 products may be shortened.
    """
    outcome: dict[str, Any] = {"errors": [], "engine_bytes": 0}
    with Path(job["log"]).open("w", encoding="utf-8", buffering=1) as file:
        log = Log(file)
        builder = trt.Builder(log)
        network = builder.create_network(0)
        begun = time.perf_counter()
        outcome["errors"] = parse(job["source"], network, log)
        outcome["parse_s"] = time.perf_counter() - begun
        if not outcome["errors"]:
            begun = time.perf_counter()
            plan = builder.build_serialized_network(network, configuration(builder, job))
            outcome["build_s"] = time.perf_counter() - begun
            if plan is not None:
                outcome["engine_bytes"] = Path(job["engine"]).write_bytes(memoryview(plan))
    Path(job["result"]).write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
