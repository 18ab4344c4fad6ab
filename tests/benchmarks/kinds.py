"""Every kind of compressed model × {the plain dynamo exporter, edgedeploy}: what is kept, with errors against PyTorch.

    python -m tests.benchmarks.kinds [--write FILE.md] [KIND ...]

The plain exporter is torch.onnx.export(dynamo=True) on the same module. "expanded" says how many times more bytes of
constants its file stores than edgedeploy's. Errors are the largest of any output element in ratio to the largest output, on 64 samples of
standard normal noise; where activations are quantized, the difference is also counted in steps of an 8-bit output grid.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from onnx import numpy_helper

from edgedeploy import pipeline
from edgedeploy.errors import EdgedeployError
from edgedeploy.prepare.source.reference import stop_observers
from tests import kinds

ROOT = Path(__file__).parent.parent.parent
SAMPLES = 64
HEAD = """\
# Kinds of compressed models

Made by `python -m tests.benchmarks.kinds --write edgedeploy/KINDS.md`; do not edit. Each kind is made by the real torch
and torchao calls in `tests/kinds.py`. *Plain* is `torch.onnx.export(dynamo=True)` on the same module: the bytes of
constants that it stores in ratio to edgedeploy's artifact, or the error it ends with. *Error* is the largest difference
from PyTorch in ratio to the largest output; *steps* counts it in steps of an 8-bit grid over the output's range.

| kind | plain exporter | found | built as | kept? | error | steps | bytes of constants |
|---|---|---|---|---|---|---|---|
"""


def inputs_of(name, count=SAMPLES):
    rng = np.random.default_rng(7)
    return {
        key: rng.standard_normal((count, *shape[1:])).astype(np.float32) for key, shape in kinds.KINDS[name][1].items()
    }


def tensors_for(module, feeds):
    """Return inputs as torch wants them: in the short float that the module has, if it has one."""
    short = {parameter.dtype for parameter in module.parameters()} & {torch.float16, torch.bfloat16}
    return tuple(torch.from_numpy(value).to(next(iter(short), torch.float32)) for value in feeds.values())


def answers(module, feeds):
    """Return PyTorch's outputs as float32 arrays, in order; prepared models stop observing, which would move their grids."""
    stop_observers(module)
    tensors = tensors_for(module, feeds)
    with torch.no_grad():
        made = module(*tensors)
    values = made.values() if isinstance(made, dict) else made if isinstance(made, tuple) else (made,)
    return [value.float().numpy() for value in values]


def plain_export(name):
    """Return the bytes of constants that the plain exporter writes, or its error's type."""
    module = kinds.make(name)
    batch = torch.export.Dim("batch")
    example = tensors_for(module, inputs_of(name, 2))
    try:
        program = torch.onnx.export(
            module, example, dynamo=True, verbose=False, dynamic_shapes=tuple({0: batch} for _ in example)
        )
    except Exception as error:  # noqa: BLE001 - the table says what it ends with, whatever that is
        return f"fails: {type(error.__cause__ or error).__name__}"
    graph = program.model_proto.graph
    inner = [
        item.t for node in graph.node if node.op_type == "Constant" for item in node.attribute if item.name == "value"
    ]
    return sum(len(item.raw_data) or numpy_helper.to_array(item).nbytes for item in [*graph.initializer, *inner])


def shipped(name, folder):
    """Compile a kind as what it is: the first precision that keeps it."""
    shapes = kinds.KINDS[name][1]
    inputs = [f"{key}={','.join(str(size) for size in shape)}" for key, shape in shapes.items()]
    refusals = []
    for precision in ("fp32", "fp16", "int8"):
        try:
            built = pipeline.compile(
                f"tests.kinds:{kinds.slug(name)}", inputs=inputs, precision=precision, output=folder / kinds.slug(name)
            )
        except EdgedeployError as error:
            refusals.append(f"{precision}: {error}")
            continue
        return precision, built
    return refusals, None


def figures(name, folder):
    row = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row["plain"] = plain_export(name)
        precision, built = shipped(name, folder)
        if built is None:
            return {**row, "refused": precision}
        feeds = inputs_of(name)
        expected = answers(kinds.make(name), feeds)
    from edgedeploy.prepare.graph import Runner

    actual = Runner(built.file)(feeds)
    error = max(
        float(np.abs(made - value).max() / np.abs(value).max())
        for made, value in zip(actual.values(), expected, strict=True)
    )
    steps = max(
        float(np.abs(made - value).max() / (np.ptp(value) / 255))
        for made, value in zip(actual.values(), expected, strict=True)
    )
    statements = built.artifact.compression.statements
    return {
        **row,
        "found": [item.kind for item in statements],
        "precision": precision,
        "statements": [item.artifact for item in statements],
        "max_relative_error": error,
        "output_steps": steps,
        "bytes": built.artifact.compression.initializer_bytes,
        "notes": list(built.artifact.notes),
    }


def line(name, row):
    if "refused" in row:
        return f"| {name} | {_plain(row)} | | refused: {row['refused'][-1]} | | | | |"
    kept = ", ".join(dict.fromkeys(row["statements"])) or "nothing to keep"
    found = ", ".join(dict.fromkeys(row["found"])) or "plain float"
    return (
        f"| {name} | {_plain(row)} | {found} | {row['precision']} | {kept} | {row['max_relative_error']:.1e} | "
        f"{row['output_steps']:.1f} | {row['bytes']} |"
    )


def _plain(row):
    if isinstance(row["plain"], str) or "bytes" not in row:
        return row["plain"]
    ratio = row["plain"] / row["bytes"]
    return f"{'expanded ' if ratio > 1.3 else ''}{ratio:.1f}×"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    os.chdir(ROOT)
    report = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EDGEDEPLOY_CACHE_DIR"] = str(Path(scratch) / "cache")
        for name in given.names or kinds.KINDS:
            # Exporters print, and the answer goes to stdout.
            held, sys.stdout = sys.stdout, io.StringIO()
            try:
                report[name] = figures(name, Path(scratch))
            finally:
                sys.stdout = held
            print(line(name, report[name]), file=sys.stderr, flush=True)
    if given.write:
        given.write.write_text(HEAD + "".join(f"{line(name, row)}\n" for name, row in report.items()))
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
