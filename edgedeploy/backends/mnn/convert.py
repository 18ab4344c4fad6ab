"""A child process of the MNN back end: converts one file, or runs one once.

It imports the extension modules alone. `MNN.tools` and the console scripts of that package install an SDK with pip when
they are imported, and upload what they convert to a server; nothing here comes near them.
"""

import json
import sys
from pathlib import Path
from typing import Any


def convert(arguments: list[str]) -> bool:
    """Convert by a command line of MNNConvert; what it prints goes to our own output."""
    import _tools

    return bool(_tools.mnnconvert(["mnnconvert", *arguments]))


def run_once(path: str, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Run a .mnn on zeros and return what the runtime executed and what it takes and gives.

    Args:
        path: the file.
        shapes: input name -> sizes; axes that stay open without an entry become 1.
    """
    import MNN
    import numpy

    interpreter = MNN.Interpreter(path)
    session = interpreter.createSession({"backend": "CPU", "numThread": 1, "precision": "high"})
    if session is None:
        raise ValueError("the runtime makes no session of it")
    inputs = interpreter.getSessionInputAll(session)
    for name, tensor in inputs.items():
        sizes = tuple(shapes.get(name) or (max(int(size), 1) for size in tensor.getShape()))
        if sizes != tuple(tensor.getShape()):
            interpreter.resizeTensor(tensor, sizes)
    interpreter.resizeSession(session)
    types = {
        MNN.Halide_Type_Float: numpy.float32, MNN.Halide_Type_Int: numpy.int32, MNN.Halide_Type_Uint8: numpy.uint8,
        MNN.Halide_Type_Int64: numpy.int64,
    }  # fmt: skip
    for tensor in inputs.values():
        kind = next(key for key in types if key == tensor.getDataType())
        data = numpy.zeros(tensor.getShape(), types[kind])
        tensor.copyFrom(MNN.Tensor(tensor.getShape(), kind, data, MNN.Tensor_DimensionType_Caffe))
    executed: list[list[str]] = []

    def note(_tensors: Any, operator: Any) -> bool:
        executed.append([operator.getName(), operator.getType()])
        return True

    interpreter.runSessionWithCallBackInfo(session, lambda _tensors, _operator: True, note)
    return {
        "executed": executed,
        "inputs": {name: list(tensor.getShape()) for name, tensor in inputs.items()},
        "outputs": {name: list(item.getShape()) for name, item in interpreter.getSessionOutputAll(session).items()},
    }


def main(path: Path) -> None:
    """Do what a job file says and write what came of it where it says."""
    job = json.loads(path.read_text(encoding="utf-8"))
    is_conversion = job["do"] == "convert"
    result = {"answer": convert(job["arguments"])} if is_conversion else run_once(job["file"], job["shapes"])
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
