"""A model reference becomes a module, an exported program or an ONNX graph, without running code that a file carries.

A Python reference names code that the person has and trusts; a weights or model file may come from anywhere.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgedeploy.documents import closest
from edgedeploy.errors import BackendMissing, ModelError, UntrustedPickle, UsageError, WeightsMismatch
from edgedeploy.prepare.silence import silenced
from edgedeploy.storage import sha256_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto
    from torch import Tensor, nn

# How many names of each kind a WeightsMismatch lists.
_LISTED = 10
# What training scripts wrap a state_dict in.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# What torch says of the first thing in a file that is no tensor.
_PICKLED_NAME = re.compile(r"GLOBAL ([\w.]+)")
_PICKLE_WHY = "unpickling runs whatever code the file carries"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in the form it came in.

    Attributes:
        kind: "module" (torch.nn.Module in evaluation mode), "exported" (torch.export.ExportedProgram) or "onnx"
            (onnx.ModelProto, weights inside).
        source: the reference as given.
        program: the object itself.
        weights_sha256: digest of the weights file, "" without one.
    """

    kind: Literal["module", "exported", "onnx"]
    source: str
    program: Any
    weights_sha256: str = ""


def load(source: str, weights: Path | None, *, base: Path, trust_pickle: bool = False) -> Loaded:
    """Load a model.

    Args:
        source: "package.module:factory" (importable from `base` or the environment), "x.pt2" or "x.onnx".
        weights: a state_dict for a factory: .safetensors, or a .pt that holds nothing but tensors.
        base: folder that relative files and modules are looked up in.
        trust_pickle: read files that can only be read by unpickling, which runs code that they carry.

    Raises:
        UsageError: the source is of no known kind or no file, or weights are given for one that carries its own.
        ModelError: what is named fails, is damaged, or has weights that are no numbers.
        UntrustedPickle: a file needs unpickling and `trust_pickle` is False.
        WeightsMismatch: the weights do not fit.
    """
    path = base / source
    if path.suffix in (".pt2", ".onnx", ".pt", ".pth"):
        if not path.is_file():
            raise UsageError(f"the model file {path} does not exist; check the path")
        if weights is not None:
            raise UsageError(f"{source} carries its own weights; leave out {weights} or name a Python factory instead")
        if path.suffix == ".onnx":
            graph = _onnx_from(path)
            _demand_numbers(source, _float_constants(graph))
            return Loaded("onnx", source, graph)
        _need_torch()
        if path.suffix == ".pt2":
            from edgedeploy.prepare.archive import load_archive

            program = load_archive(path, trust_pickle=trust_pickle)
            _demand_numbers(source, _float_tensors(program.state_dict))
            return Loaded("exported", source, program)
        module = _module_from_pickle(path, trust_pickle=trust_pickle)
        _demand_numbers(source, _float_tensors(module.state_dict()))
        return Loaded("module", source, module)
    if ":" not in source:
        raise UsageError(
            f"{source!r} is no model that edgedeploy knows; give package.module:factory, a .pt2 or a .onnx file"
        )
    _need_torch()
    module = _module_from_reference(source, base)
    digest = ""
    if weights is not None:
        digest = _fill(module, weights, trust_pickle=trust_pickle)
    _demand_numbers(str(weights or source), _float_tensors(module.state_dict()))
    return Loaded("module", source, _evaluated(module), digest)


def _evaluated(module: nn.Module) -> nn.Module:
    # A graph that was captured for quantization has its mode built in: it refuses, or answers None.
    with contextlib.suppress(NotImplementedError):
        module.eval()
    return module


def _need_torch() -> None:
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise BackendMissing(
            "PyTorch is not installed here; pip install 'edgedeploy[torch]', or give a .onnx file"
        ) from error


@contextlib.contextmanager
def _importable_from(base: Path) -> Iterator[None]:
    added = str(base.resolve())
    sys.path.insert(0, added)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(added)


def _module_from_reference(source: str, base: Path) -> nn.Module:
    from torch import nn

    module_name, _, attribute = source.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{source!r} is not package.module:factory; name a module and what in it makes the model")
    # The factory may import its neighbours when it is called, so the folder stays importable until then.
    with _importable_from(base), silenced(source):
        importlib.invalidate_caches()
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
                raise ModelError(
                    f"there is no Python module {module_name!r} in {base} or in this environment; run from the folder "
                    f"that holds it"
                ) from error
            raise ModelError(
                f"importing {module_name} failed: it needs the module {error.name!r}; install it"
            ) from error
        except Exception as error:  # the person's module may fail in any way while it is imported
            raise ModelError(f"importing {module_name} failed: {type(error).__name__}: {error}") from error
        for step in attribute.split("."):
            if not hasattr(found, step):
                public = [name for name in vars(found) if not name.startswith("_")]
                raise ModelError(f"{module_name} has no {attribute!r}{closest(step, public)}")
            found = getattr(found, step)
        if not isinstance(found, nn.Module):
            if not callable(found):
                raise ModelError(
                    f"{source} is of type {type(found).__name__}; it must be a function that returns an nn.Module"
                )
            try:
                found = found()
            except ModuleNotFoundError as error:
                raise ModelError(f"calling {source} failed: it needs the module {error.name!r}; install it") from error
            except Exception as error:  # the person's factory may fail in any way
                raise ModelError(f"calling {source} failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise ModelError(f"{source} returned a value of type {type(found).__name__}; it must return a torch.nn.Module")
    return found


def _module_from_pickle(path: Path, *, trust_pickle: bool) -> nn.Module:
    import torch
    from torch import nn

    if not trust_pickle:
        raise UntrustedPickle(
            f"{path} is a pickled model, and {_PICKLE_WHY}; name a Python factory and give this file as weights, save "
            f"it by torch.export.save, or pass --trust-pickle if you made it yourself"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs foreign code, which may fail in any way
        raise ModelError(f"{path} cannot be unpickled: {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise ModelError(
            f"{path} holds a {type(found).__name__}, not a model; name a Python factory and give this file as weights"
        )
    return _evaluated(found)


def _fill(module: nn.Module, path: Path, *, trust_pickle: bool) -> str:
    if not path.is_file():
        raise UsageError(f"the weights file {path} does not exist; check the path")
    state = _state_from(path, trust_pickle=trust_pickle)
    expected = module.state_dict()
    # How many batches training saw changes nothing in evaluation, and many files leave it out.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} (model {_shape(expected[key])}, file {_shape(state[key])})"
        for key in expected
        if key in state and tuple(expected[key].shape) != tuple(state[key].shape)
    ]
    if missing or unexpected or shapes:
        parts = [
            _listed("missing from the file", missing),
            _listed("unknown to the model", unexpected),
            _listed("of another shape", shapes),
        ]
        raise WeightsMismatch(f"{path} does not fit the model: " + "; ".join(part for part in parts if part))
    module.load_state_dict(dict(state), strict=False)
    return sha256_file(path)


def _state_from(path: Path, *, trust_pickle: bool) -> Mapping[str, Tensor]:
    import torch

    if path.suffix == ".safetensors":
        import safetensors
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read as safetensors (truncated or damaged?): {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (zipfile.is_zipfile(path) or _begins_as_pickle(path)):
            raise ModelError(
                f"{path} cannot be read as weights (truncated or damaged?); save module.state_dict() by safetensors"
            ) from error
        if not trust_pickle:
            held = _PICKLED_NAME.search(str(error))
            raise UntrustedPickle(
                f"{path} holds more than tensors{f' ({held[1]})' if held else ''}, and {_PICKLE_WHY}; save "
                f"module.state_dict() by safetensors, or pass --trust-pickle if you made the file yourself"
            ) from error
        try:
            found = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as second:  # unpickling runs foreign code, which may fail in any way
            raise ModelError(f"{path} cannot be unpickled: {type(second).__name__}: {second}") from second
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as weights (truncated or damaged?): {_first_line(error)}") from error
    return _unwrapped(path, found)


def _begins_as_pickle(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(1) == b"\x80"


def _unwrapped(path: Path, found: Any) -> Mapping[str, Tensor]:
    from torch import Tensor, nn

    if isinstance(found, nn.Module):
        return found.state_dict()
    if isinstance(found, Mapping):
        for key in _WRAPPERS:
            if isinstance(found.get(key), Mapping):
                found = found[key]
                break
        if found and all(isinstance(value, Tensor) for value in found.values()):
            return dict(found)
        others = [str(key) for key, value in found.items() if not isinstance(value, Tensor)]
        raise ModelError(
            f"{path} is no state_dict: {_listed('entries that are no tensors', others) or 'it is empty'}; save "
            f"module.state_dict()"
        )
    raise ModelError(f"{path} holds a {type(found).__name__}, not a state_dict; save module.state_dict()")


def _onnx_from(path: Path) -> ModelProto:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise BackendMissing("the package onnx is not installed here; pip install 'edgedeploy[onnxruntime]'") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{path} cannot be read as ONNX (truncated or damaged?): {error}; export or copy it again"
        ) from error
    folder = path.resolve().parent
    for tensor in _tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _demand_inside(path, folder, tensor)
            try:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            except (ValueError, OSError, onnx.checker.ValidationError) as error:
                raise ModelError(f"the external data of {tensor.name!r} in {path} cannot be read: {error}") from error
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"{path} is not a valid ONNX model: {_first_line(error)}") from error
    return model


def _demand_numbers(source: str, weights: Iterator[tuple[str, NDArray[Any]]]) -> None:
    """Refuse NaN: every comparison with it is false, so that no later check would see what it spoils."""
    import numpy as np

    for name, values in weights:
        if broken := int(np.count_nonzero(np.isnan(values))):
            raise ModelError(
                f"{source} holds NaN in {name!r} ({broken:,} of {values.size:,} values), so its answers are no "
                f"numbers; take the weights of a training step before it diverged"
            )


def _float_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    import torch

    for name, value in state.items():
        # Subclasses keep codes and scales, which are looked at as what they stand for when they are lowered.
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_floating_point():
            yield name, value.detach().float().numpy()


def _float_constants(model: ModelProto) -> Iterator[tuple[str, NDArray[Any]]]:
    from onnx import TensorProto, numpy_helper

    for tensor in _tensors_of(model):
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
            yield tensor.name, numpy_helper.to_array(tensor)


def _tensors_of(model: ModelProto) -> Iterator[Any]:
    from onnx.external_data_helper import _get_all_tensors

    # The function is private, and the public one reads the files before we could look at their paths.
    yield from _get_all_tensors(model)


def _demand_inside(path: Path, folder: Path, tensor: Any) -> None:
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    target = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not target.is_relative_to(folder):
        raise ModelError(
            f"{path} wants the data of {tensor.name!r} from {location!r}, which is outside its folder; refused: a "
            f"model file may only read files beside it"
        )
    if not target.is_file():
        raise ModelError(f"{path} wants the data of {tensor.name!r} from {location!r}, which is not there; copy it too")


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:_LISTED])}{more}"


def _shape(tensor: Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape) or "scalar"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
