"""The converter's child process: ONNX to a float .tflite, and what its tensors then hold.

Runs in the tool environment and imports nothing of ours: `python convert.py job.json`. The job names the files; what
went wrong is written to the file `error`, as text, with exit code 1.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

# The stem of the converter's input is stored in its output.
STEM = "model"


def convert(job: dict[str, Any]) -> None:
    """Convert job["onnx"] to job["tflite"]; inputs named in job["keep"] keep the order of their axes."""
    import onnx2tf

    folder = Path(job["folder"])
    onnx2tf.convert(
        input_onnx_file_path=str(folder / f"{STEM}.onnx"),
        output_folder_path=str(folder / "converted"),
        keep_ncw_or_nchw_or_ncdhw_input_names=job["keep"] or None,
        # onnxsim is no part of the environment; the graph is simplified before, where that can be checked.
        not_use_onnxsim=True,
        non_verbose=True,
    )
    (folder / "converted" / f"{STEM}_float32.tflite").replace(job["tflite"])


def observe(job: dict[str, Any]) -> None:
    """Run job["tflite"] on the arrays of job["inputs"] and write what each of its tensors held, by index.

    An input that fits in its own order of axes is given so, else channels last.
    """
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_path=job["tflite"],
        num_threads=1,
        # A delegate fuses operators away; what they held could not be read.
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    given = np.load(job["inputs"], allow_pickle=False)
    arrays = {}
    for item in interpreter.get_input_details():
        values = given[item["name"]]
        if not _fits(item["shape_signature"], values.shape):
            values = np.moveaxis(values, 1, -1)
        if not _fits(item["shape_signature"], values.shape):
            raise ValueError(f"input {item['name']} became {item['shape_signature'].tolist()} from {values.shape}")
        arrays[item["index"]] = np.ascontiguousarray(values)
        if tuple(item["shape"]) != values.shape:
            interpreter.resize_tensor_input(item["index"], values.shape)
    interpreter.allocate_tensors()
    for index, values in arrays.items():
        interpreter.set_tensor(index, values)
    interpreter.invoke()
    held = {}
    for item in interpreter.get_tensor_details():
        try:
            held[str(item["index"])] = interpreter.get_tensor(item["index"])
        except ValueError:  # an optional tensor, or one of a branch that was not taken, holds nothing
            continue
    np.savez(job["tensors"], **held)


def _fits(signature: Any, shape: tuple[int, ...]) -> bool:
    return len(signature) == len(shape) and all(want in (-1, got) for want, got in zip(signature, shape, strict=True))


def main(path: str) -> int:
    """Do a job; "steps" says what of it."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        for step in job["steps"]:
            {"convert": convert, "observe": observe}[step](job)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to say it
        traceback.print_exc()
        Path(job["error"]).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
