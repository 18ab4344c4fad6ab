"""What tests of the back ends share: torch's quantized engine as it was at the start, and its exporter's table of operators."""

import functools
import sys

import pytest

_engine_at_start: list[str] = []


def pytest_collection_finish():
    if "torch" in sys.modules:
        _engine_at_start.append(sys.modules["torch"].backends.quantized.engine)


@pytest.fixture(autouse=True)
def quantized_engine_of_the_start():
    """A test never meets the engine that an earlier test left switched on in torch."""
    if _engine_at_start:
        sys.modules["torch"].backends.quantized.engine = _engine_at_start[0]


@pytest.fixture(autouse=True)
def exporter_reads_its_table_once():
    """Every torch.onnx.export parses the source of 500 functions again, for half a second; here a process does so once."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration is None or hasattr(registration.ONNXRegistry.from_torchlib, "__wrapped__"):
        return
    # Of each opset the table is another one, the functions are not.
    registration.onnxscript_apis.get_torchlib_ops = functools.cache(registration.onnxscript_apis.get_torchlib_ops)
    registry_class = registration.ONNXRegistry
    read = registry_class.from_torchlib
    read_before = {}

    def from_torchlib(*arguments, **named):
        key = (arguments, *sorted(named.items()))
        if key not in read_before:
            read_before[key] = read(*arguments, **named)
        fresh = registry_class()  # whoever exports may add operators of its own
        fresh.__dict__.update(read_before[key].__dict__)
        fresh.functions = {name: list(found) for name, found in fresh.functions.items()}
        return fresh

    from_torchlib.__wrapped__ = read
    registry_class.from_torchlib = staticmethod(from_torchlib)
