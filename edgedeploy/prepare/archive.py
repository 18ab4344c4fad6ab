"""Reads a .pt2 without running code that it carries.

torch.export.load (2.13) trusts its file in seven ways: payloads marked as pickled are unpickled; sample inputs fall
back to full unpickling; compiled libraries under data/aotinductor are loaded into the process; sizes go through
sympy.sympify, which evaluates Python; an operator may be any attribute of torch ("torch.os.system"), a tree of inputs
may name any module to import; guards are Python text, and names become parts of one. So every entry is checked against
what an ordinary exported network needs, and torch is given a copy of exactly the entries that were checked.
"""

from __future__ import annotations

import importlib
import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedeploy.errors import BackendMissing, EdgedeployError, ModelError, UntrustedPickle
from edgedeploy.prepare.silence import silenced

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_PLAIN_ENTRY = re.compile(
    r"(archive_format|archive_version|byteorder|version|\.data/version|\.data/serialization_id|\.format_version"
    r"|\.storage_alignment|data/weights/weight_\d+|data/constants/tensor_\d+)"
)
_PAYLOAD_LIST = re.compile(r"data/(weights|constants)/model_(weights|constants)_config\.json")
_PROGRAM = "models/model.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"

# A size expression as sympy writes it: Symbol('s31', positive=True), s0*s1 + 2. No attribute, other text or other name.
_TOKEN = re.compile(r"'[a-z]{1,3}\d+'|[A-Za-z_]\w*|\d+(?:\.\d+)?|\S")
_HARMLESS_TOKEN = re.compile(
    r"'[a-z]{1,3}\d+'|[a-z]{1,3}\d+|\d+(?:\.\d+)?|[-+*/%()<>=,&|~]"
    r"|Symbol|Integer|Add|Mul|Pow|Max|Min|Mod|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|floor|ceiling|oo|int_oo|true|false|True|False"
    r"|FloorDiv|CeilDiv|CleanDiv|PythonMod|ModularIndexing|Where|PowByNatural|IntTrueDiv|FloatTrueDiv|ToFloat|TruncToInt"
    r"|CeilToInt|FloorToInt|RoundToInt|Identity|integer|positive|nonnegative|negative|real"
)
# aten.from_file maps any file of this machine, and changes its size; of torchao only arithmetic on grids is needed.
_NAMESPACES = "aten|prims|quantized_decomposed|torchvision"
_OPERATOR = re.compile(
    rf"torch\.ops\.(?:{_NAMESPACES})\.(?!__|from_file\b)\w+(?:\.(?!__)\w+)?"
    r"|torch\.ops\.torchao\.(?:choose_qparams|quantize|dequantize)_affine(?:\.default)?"
    r"|_operator\.(?:getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.[a-z]\w*|torch\.sym_[a-z]+|torch\._sym_sqrt"
)
_NAME = re.compile(r"[\w.:+-]*")
# Operators that a library registers with torch when it is imported: how a file names them → what to import.
_REGISTERED_BY = {
    b"torch.ops.quantized_decomposed.": "torch.ao.quantization.fx._decomposed",
    b"torch.ops.torchao.": "torchao",
}
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def load_archive(path: Path, *, trust_pickle: bool) -> ExportedProgram:
    """Load an exported program.

    Args:
        path: a .pt2 that torch.export.save wrote.
        trust_pickle: skip the checks and let torch unpickle.

    Raises:
        ModelError: not such a file, or damaged.
        UntrustedPickle: it holds more than numbers and a graph of plain operators, and `trust_pickle` is False.
        BackendMissing: its operators are those of a library that is not installed here.
    """
    import torch

    source: Any = path if trust_pickle else _checked_copy(path)
    try:
        # Libraries that register operators talk about what this machine lacks while they are imported.
        with silenced(str(path)):
            _register_operators(path, source)
            return torch.export.load(source)
    except EdgedeployError:
        raise
    except ModuleNotFoundError as error:  # a trusted pickle names classes of a library
        raise BackendMissing(
            f"{path} needs the module {error.name}, which is not installed here; pip install {error.name}"
        ) from error
    except Exception as error:  # torch raises whatever its parsers meet in a damaged file
        raise ModelError(
            f"{path} cannot be loaded as an exported program (damaged, or saved by an incompatible PyTorch?): "
            f"{type(error).__name__}: {error}"
        ) from error


def _register_operators(path: Path, source: Path | io.BytesIO) -> None:
    try:
        with zipfile.ZipFile(source) as archive:
            program = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(f"/{_PROGRAM}"))
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise ModelError(f"{path} cannot be read as .pt2 (truncated or damaged?): {error}") from error
    if isinstance(source, io.BytesIO):
        source.seek(0)
    for prefix, library in _REGISTERED_BY.items():
        if prefix not in program:
            continue
        try:
            importlib.import_module(library)
        except ModuleNotFoundError as error:
            raise BackendMissing(
                f"{path} uses operators of {library.partition('.')[0]}, which is not installed here; "
                f"pip install {library.partition('.')[0]}"
            ) from error


def _checked_copy(path: Path) -> io.BytesIO:
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as checked:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise UntrustedPickle(_refusal(path, "two entries share a name"))
            root = names[0].split("/", 1)[0] + "/" if names else ""
            if root + _PROGRAM not in names:
                raise ModelError(
                    f"{path} holds no exported program (no {_PROGRAM} in it); save one by torch.export.save"
                )
            for name in names:
                if not name.startswith(root):
                    raise UntrustedPickle(_refusal(path, f"it has the unexpected entry {name!r}"))
                data = _harmless(path, name.removeprefix(root), archive.read(name))
                checked.writestr(zipfile.ZipInfo(name), data)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise ModelError(f"{path} cannot be read as .pt2 (truncated or damaged?): {error}") from error
    copy.seek(0)
    return copy


def _harmless(path: Path, entry: str, data: bytes) -> bytes:
    if _PLAIN_ENTRY.fullmatch(entry):
        return data
    if _PAYLOAD_LIST.fullmatch(entry):
        for name, payload in _json(path, entry, data).get("config", {}).items():
            if payload.get("use_pickle") is not False or not re.fullmatch(
                r"(weight|tensor)_\d+", str(payload.get("path_name"))
            ):
                raise UntrustedPickle(_refusal(path, f"{name!r} in it is pickled"))
    elif entry == _SAMPLE_INPUTS:
        _demand_only_tensors(path, data)
    elif entry == _PROGRAM:
        program = _json(path, entry, data)
        for reason in _suspicions(program):
            raise UntrustedPickle(_refusal(path, reason))
        # Guards check shapes before each call, which the graph does too; metadata is for people who debug.
        program["guards_code"] = []
        _drop_metadata(program)
        return json.dumps(program).encode()
    else:
        raise UntrustedPickle(_refusal(path, f"it has the unexpected entry {entry!r}"))
    return data


def _demand_only_tensors(path: Path, data: bytes) -> None:
    import torch

    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError as error:
        raise UntrustedPickle(_refusal(path, "its sample inputs hold more than tensors")) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ModelError(f"{path} holds damaged sample inputs: {error}") from error


def _suspicions(program: Any) -> Iterator[str]:
    """Yield what in a program's JSON would make torch evaluate, import or call more than arithmetic and operators."""
    if isinstance(program, dict):
        for key, value in program.items():
            if key in ("range_constraints", "symbol_values"):
                for expression in value:
                    yield from _expression_suspicions(expression)
            elif key == "expr_str":
                yield from _expression_suspicions(value)
            elif key == "as_operator" or (key == "target" and "inputs" in program):
                yield from _operator_suspicions(value)
            elif key in ("in_spec", "out_spec") and isinstance(value, str) and value:
                yield from _tree_suspicions(value)
            # Metadata and guards are dropped, and a string argument stays a string.
            elif key not in ("metadata", "guards_code", "as_string", "as_strings"):
                yield from _suspicions(value)
    elif isinstance(program, list):
        for value in program:
            yield from _suspicions(value)
    elif isinstance(program, str) and not _NAME.fullmatch(program):
        yield f"the name {program!r} in it is no plain name"


def _operator_suspicions(text: Any) -> Iterator[str]:
    if not isinstance(text, str) or not _OPERATOR.fullmatch(text):
        yield f"the operator {text!r} in it is none of PyTorch's own"


def _expression_suspicions(text: Any) -> Iterator[str]:
    if not isinstance(text, str) or not all(_HARMLESS_TOKEN.fullmatch(token) for token in _TOKEN.findall(text)):
        yield f"the size expression {text!r} in it is more than arithmetic"


def _tree_suspicions(text: str) -> Iterator[str]:
    try:
        trees = [json.loads(text)]
    except ValueError:
        yield "its tree of inputs is not JSON"
        return
    while trees:
        tree = trees.pop()
        if isinstance(tree, list):
            trees += [item for item in tree if isinstance(item, dict)]
        elif isinstance(tree, dict):
            if tree.get("type") not in (None, *_CONTAINERS) or "__enum__" in str(tree.get("context")):
                yield f"its inputs or outputs are of the kind {tree.get('type')!r}"
            trees += tree.get("children_spec", [])


def _drop_metadata(program: Any) -> None:
    children = list(program.values()) if isinstance(program, dict) else program if isinstance(program, list) else []
    if isinstance(program, dict) and isinstance(program.get("metadata"), dict):
        program["metadata"] = {}
    for child in children:
        _drop_metadata(child)


def _json(path: Path, entry: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {entry} in it is not JSON: {error}") from error


def _refusal(path: Path, reason: str) -> str:
    return (
        f"{path} can only be loaded by running code that it may carry ({reason}); export the model again as plain "
        f"tensors and operators, name a Python factory, or pass --trust-pickle if you made the file yourself"
    )
