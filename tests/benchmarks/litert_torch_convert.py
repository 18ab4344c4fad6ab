"""The child of litert_torch_cross_check: an exported program becomes a .tflite by litert-torch, and is run once.

Runs in litert-torch's own environment and imports nothing of ours. Arguments: the program (.pt2), an .npz with the
inputs in order, a folder for the .tflite. Prints one line of JSON: seconds to convert, bytes, operators, and writes the
answers of the first output to answers.npy there.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def main():
    program_path, inputs_path, folder = map(Path, sys.argv[1:4])
    import litert_torch
    import torch
    from ai_edge_litert.interpreter import Interpreter

    with np.load(inputs_path) as stored:
        inputs = [stored[name] for name in stored.files]
    program = torch.export.load(program_path)
    example = tuple(torch.from_numpy(array[:1]) for array in inputs)
    begin = time.perf_counter()
    converted = litert_torch.convert(_module(program), example)
    seconds = time.perf_counter() - begin
    path = folder / "litert_torch.tflite"
    converted.export(str(path))
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    places = [entry["index"] for entry in interpreter.get_input_details()]
    out = interpreter.get_output_details()[0]["index"]
    answers = []
    for number in range(len(inputs[0])):
        for place, array in zip(places, inputs, strict=True):
            interpreter.set_tensor(place, array[number : number + 1])
        interpreter.invoke()
        answers.append(interpreter.get_tensor(out))
    np.save(folder / "answers.npy", np.concatenate(answers))
    operators = sorted({entry["op_name"] for entry in interpreter._get_ops_details()} - {"DELEGATE"})
    print(json.dumps({"convert_s": seconds, "size_bytes": path.stat().st_size, "operators": operators}))


def _module(program):
    """Return the program as a module; litert-torch asks modules whether they train, which programs cannot say."""
    module = program.module()
    module.eval = lambda: module
    module.training = False
    return module


if __name__ == "__main__":
    main()
