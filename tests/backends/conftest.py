"""A test of the back ends never meets the quantized engine that an earlier test left switched on in torch."""

import sys

import pytest

_engine_at_start: list[str] = []


def pytest_collection_finish():
    if "torch" in sys.modules:
        _engine_at_start.append(sys.modules["torch"].backends.quantized.engine)


@pytest.fixture(autouse=True)
def quantized_engine_of_the_start():
    if _engine_at_start:
        sys.modules["torch"].backends.quantized.engine = _engine_at_start[0]
