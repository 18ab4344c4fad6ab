"""What a .mnn file holds: operators, tensors, scales and codes, read from its bytes.

The format is a FlatBuffer. Its tables and the numbers of their fields are those of MNN's own schema (MNN 3.6,
schema/default/MNN.fbs and CaffeOp.fbs; field numbers never change there). MNN's own dump rounds scales to six digits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import CompileError

# Numbers in the enumeration OpType of operators whose parameters are a Convolution2D.
CONVOLUTIONS = {12: "Convolution", 13: "ConvolutionDepthwise", 17: "Deconvolution", 18: "DeconvolutionDepthwise"}
# Numbers in the union OpParameter.
_CONVOLUTION_PARAMETERS, _INPUT_PARAMETERS = 9, 21
# IDSTQuan.type: how `buffer` is to be read.
_TABLE, _SPARSE, _HALF, _PLAIN = 1, 2, 3, 4
_UUID_LENGTH = 36


class _Bytes:
    """A FlatBuffer, every read checked against its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def number(self, position: int, kind: str) -> Any:
        if position < 0:
            raise _damaged()
        try:
            return struct.unpack_from("<" + kind, self.data, position)[0]
        except struct.error as error:
            raise _damaged() from error

    def follow(self, position: int) -> int:
        return position + int(self.number(position, "I"))

    def items(self, position: int, size: int) -> tuple[int, int]:
        """Return where a vector's items start and how many there are."""
        count = int(self.number(position, "I"))
        if position + 4 + count * size > len(self.data):
            raise _damaged()
        return position + 4, count


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a FlatBuffer."""

    source: _Bytes
    position: int

    def field(self, index: int) -> int | None:
        """Return where a field's value stands, None where the field is absent."""
        start = self.position - int(self.source.number(self.position, "i"))
        if 4 + 2 * index >= self.source.number(start, "H"):
            return None
        offset = int(self.source.number(start + 4 + 2 * index, "H"))
        return self.position + offset if offset else None

    def number(self, index: int, kind: str, absent: Any = 0) -> Any:
        """Return a number; `kind` is a letter of the module struct."""
        place = self.field(index)
        return absent if place is None else self.source.number(place, kind)

    def table(self, index: int) -> Table | None:
        """Return a table that a field refers to."""
        place = self.field(index)
        return None if place is None else Table(self.source, self.source.follow(place))

    def tables(self, index: int) -> list[Table]:
        """Return a vector of tables."""
        place = self.field(index)
        if place is None:
            return []
        start, count = self.source.items(self.source.follow(place), 4)
        return [Table(self.source, self.source.follow(start + 4 * item)) for item in range(count)]

    def vector(self, index: int, dtype: str) -> NDArray[Any]:
        """Return a vector of numbers."""
        start, count = self.place(index, np.dtype(dtype).itemsize)
        return (
            np.frombuffer(self.source.data, np.dtype(dtype).newbyteorder("<"), count, start)
            if count
            else np.zeros(0, dtype)
        )

    def place(self, index: int, size: int) -> tuple[int, int]:
        """Return where a vector's items start in the file and how many there are."""
        place = self.field(index)
        return (0, 0) if place is None else self.source.items(self.source.follow(place), size)

    def text(self, index: int) -> str:
        """Return a string."""
        start, count = self.place(index, 1)
        return self.source.data[start : start + count].decode("utf-8", "replace")

    def texts(self, index: int) -> list[str]:
        """Return a vector of strings."""
        place = self.field(index)
        if place is None:
            return []
        start, count = self.source.items(self.source.follow(place), 4)
        found = []
        for item in range(count):
            first, length = self.source.items(self.source.follow(start + 4 * item), 1)
            found.append(self.source.data[first : first + length].decode("utf-8", "replace"))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What a convolution's weights are stored as.

    Attributes:
        storage: "float32", "float16" or "int8".
        scales: one per output channel (float32); two per channel, minimum and step, where `is_asymmetric`.
        codes: (output channels, the rest), int8; None for floats.
        codes_place: where the codes stand in the file, one byte each; None where they are packed.
        codes_offset: what is added to a code before it is written there.
        scales_place: where the scales stand.
    """

    storage: str
    scales: NDArray[np.float32]
    is_asymmetric: bool = False
    codes: NDArray[np.int8] | None = None
    codes_place: int | None = None
    codes_offset: int = 0
    scales_place: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """One operator of the file.

    Attributes:
        kind: of those with weights, as MNN writes it ("Convolution"); "" for all others.
        outputs: indices of tensors.
        input_scale: and `output_scale` where a convolution computes on integers; 0: it does not.
    """

    name: str
    kind: str
    number: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: Weights | None = None
    input_scale: float = 0.0
    output_scale: float = 0.0


@dataclass(frozen=True, slots=True)
class TensorGrid:
    """The integers of one tensor."""

    scale: float
    zero_point: int
    low_code: int
    high_code: int


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """A .mnn file.

    Attributes:
        tensors: names by index.
        grids: index of a tensor → its integers.
        outputs: names of the model's outputs.
        has_subgraphs: whether parts of it are loops or branches, which an Interpreter's session cannot run.
        metadata: what the ONNX file's metadata said.
        inputs: names of the model's inputs → where their sizes stand, four bytes each, and how many there are.
        uuid_place: where the 36 letters of the model's id stand; None without one.
    """

    version: str
    operators: tuple[Operator, ...]
    tensors: tuple[str, ...]
    grids: dict[int, TensorGrid]
    inputs: dict[str, tuple[int, int]]
    outputs: tuple[str, ...]
    has_subgraphs: bool
    metadata: dict[str, str]
    uuid_place: int | None


def read_contents(data: bytes) -> Contents:
    """Read a .mnn file.

    Raises:
        CompileError: the bytes are no such file, or end too early.
    """
    source = _Bytes(data)
    net = Table(source, source.follow(0))
    uuid_start, uuid_length = net.place(11, 1)
    extra = net.table(2)
    return Contents(
        version=extra.text(2) if extra else "",
        operators=tuple(_operator(table) for table in net.tables(3)),
        tensors=tuple(net.texts(7)),
        grids=dict(pair for table in net.tables(1) if (pair := _grid(table))),
        inputs=dict(item for table in net.tables(3) if (item := _input(table))),
        outputs=tuple(net.texts(4)),
        has_subgraphs=bool(net.tables(10)),
        metadata=_metadata(extra),
        uuid_place=uuid_start if uuid_length == _UUID_LENGTH else None,
    )


def _operator(table: Table) -> Operator:
    number = int(table.number(5, "i"))
    inputs, outputs = (tuple(int(item) for item in table.vector(index, "i4")) for index in (0, 4))
    kind = CONVOLUTIONS.get(number, "")
    parameters = table.table(2) if kind and table.number(1, "B") == _CONVOLUTION_PARAMETERS else None
    if parameters is None:
        return Operator(table.text(3), "", number, inputs, outputs)
    numbers = parameters.table(3)
    is_integer = parameters.table(4) is not None and numbers is not None
    return Operator(
        name=table.text(3),
        kind=kind,
        number=number,
        inputs=inputs,
        outputs=outputs,
        weights=_weights(parameters, numbers),
        input_scale=float(numbers.number(5, "f")) if is_integer and numbers else 0.0,
        output_scale=float(numbers.number(6, "f")) if is_integer and numbers else 0.0,
    )


def _input(table: Table) -> tuple[str, tuple[int, int]] | None:
    parameters = table.table(2) if table.number(1, "B") == _INPUT_PARAMETERS else None
    return (table.text(3), parameters.place(0, 4)) if parameters else None


def _weights(parameters: Table, numbers: Table | None) -> Weights | None:
    if numbers is None:
        weights = parameters.vector(1, "f4")
        return Weights("float32", np.zeros(0, np.float32)) if weights.size else None
    kind = int(numbers.number(2, "i"))
    scales = numbers.vector(1, "f4").astype(np.float32)
    if kind == _HALF:
        return Weights("float16", scales)
    common = parameters.table(0)
    channels = int(common.number(10, "i")) if common else 0
    start, count = numbers.place(0, 1)
    data = numbers.source.data
    codes: NDArray[np.int8] | None
    place: int | None
    if kind == _PLAIN:
        codes, place, offset = np.frombuffer(data, np.int8, count, start), start, 0
    elif kind == _TABLE:
        codes, place, offset = _from_table(data[start : start + count], start, bool(numbers.number(11, "B")))
    elif kind == _SPARSE:
        codes, place, offset = _from_sparse(data[start : start + count], bool(numbers.number(11, "B"))), None, 0
    else:
        raise CompileError(f"weights are stored in an unknown way ({kind})", backend="mnn", hint="update edgedeploy")
    if codes is not None and (not channels or codes.size % channels):
        raise _damaged()
    return Weights(
        storage="int8",
        scales=scales,
        is_asymmetric=bool(numbers.number(9, "i")),
        codes=None if codes is None else codes.reshape(channels, -1),
        codes_place=place,
        codes_offset=offset,
        scales_place=numbers.place(1, 4)[0],
    )


def _shape(data: bytes, is_wide: bool) -> tuple[int, int]:
    """Return how many elements the shape in front of packed weights stands for, and where it ends."""
    if not data:
        raise _damaged()
    size = 4 if is_wide else 2
    end = 1 + size * data[0]
    if end > len(data):
        raise _damaged()
    return int(np.prod(np.frombuffer(data[1:end], f"<u{size}").astype(np.int64))), end


def _from_table(data: bytes, start: int, is_wide: bool) -> tuple[NDArray[np.int8] | None, int | None, int]:
    """Read weights that are numbers of entries in a table of values; MNN writes all values that fit the bits.

    Source: MNN source/core/IDSTEncoder.hpp, WriteCQBlobs.
    """
    elements, end = _shape(data, is_wide)
    if end >= len(data):
        raise _damaged()
    entries = data[end] or 256
    values = np.frombuffer(data[end + 1 : end + 1 + entries], np.int8)
    first = end + 1 + entries
    bits = max(1, int(entries - 1).bit_length())
    packed = np.frombuffer(data[first:], np.uint8)
    if values.size != entries or packed.size * 8 < elements * bits:
        raise _damaged()
    numbers = _unpacked(packed, bits, elements)
    if elements and int(numbers.max()) >= entries:
        raise _damaged()
    is_plain = bits == 8 and bool((values == np.arange(-128, 128)).all())
    return values[numbers], start + first if is_plain else None, 128 if is_plain else 0


def _unpacked(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed[:count]
    flags = np.unpackbits(packed)[: count * bits].reshape(count, bits)
    weights = (1 << np.arange(bits)[::-1]).astype(np.uint8)
    return np.asarray((flags * weights).sum(axis=1), np.uint8)


def _from_sparse(data: bytes, is_wide: bool) -> NDArray[np.int8]:
    """Read weights of which only those beside zero are stored, each with its distance from the one before.

    Source: MNN source/core/IDSTEncoder.hpp, WriteSparseQuanBlobs.
    """
    elements, end = _shape(data, is_wide)
    source = _Bytes(data)
    count, bits = int(source.number(end, "I")), int(source.number(end + 4, "B"))
    steps_end = end + 5 + -(-count * bits // 8)
    entries = int(source.number(steps_end, "B")) or 256
    values = np.frombuffer(data[steps_end + 1 : steps_end + 1 + entries], np.int8)
    value_bits = max(1, int(entries - 1).bit_length())
    rest = np.frombuffer(data[steps_end + 1 + entries :], np.uint8)
    if not 1 <= bits <= 8 or values.size != entries or rest.size * 8 < count * value_bits:
        raise _damaged()
    places = np.cumsum(_unpacked(np.frombuffer(data[end + 5 : steps_end], np.uint8), bits, count).astype(np.int64))
    numbers = _unpacked(rest, value_bits, count)
    if count and (int(places[-1]) >= elements or int(numbers.max()) >= entries):
        raise _damaged()
    codes = np.zeros(elements, np.int8)
    codes[places] = values[numbers]
    return codes


def _grid(table: Table) -> tuple[int, TensorGrid] | None:
    numbers = table.table(4)
    if numbers is None:
        return None
    scale, zero, low, high = (
        float(numbers.number(index, "f", absent)) for index, absent in enumerate((0.0, 0.0, -128.0, 127.0))
    )
    return int(table.number(1, "i")), TensorGrid(scale, int(zero), int(low), int(high))


def _metadata(extra: Table | None) -> dict[str, str]:
    """Return what the converter copied from ONNX: an "Extra" in a FlatBuffer of its own, with an attribute for each."""
    if extra is None:
        return {}
    start, count = extra.place(0, 1)
    if not count:
        return {}
    source = _Bytes(extra.source.data[start : start + count])
    return {item.text(3): item.text(0) for item in Table(source, source.follow(0)).tables(3)}


def _damaged() -> CompileError:
    return CompileError("the file is damaged or is no .mnn file", backend="mnn", hint="compile the model again")
