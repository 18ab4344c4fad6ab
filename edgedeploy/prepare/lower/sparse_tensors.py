"""Makes weights that are stored as sparse tensors (COO, CSR, semi-structured …) dense, as no exporter reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgedeploy.errors import ModelError
from edgedeploy.prepare.lower.private_copy import private_copy
from edgedeploy.prepare.lower.pruning_masks import is_two_of_four
from edgedeploy.prepare.lower.replaced_calls import Call, replace_calls
from edgedeploy.records.model import FoundCompression

if TYPE_CHECKING:
    from torch import Tensor, nn


def lower_module(module: nn.Module) -> tuple[nn.Module, tuple[FoundCompression, ...]]:
    """Replace sparse parameters and buffers by dense ones of the same values, in a copy.

    Raises:
        ModelError: a sparse tensor cannot be made dense on this machine, or the module cannot be copied.
    """
    import torch

    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    sparse = {path: tensor for path, tensor in tensors if _is_sparse(tensor)}
    if not sparse:
        return module, ()
    dense: dict[int, Tensor] = {}
    for path, tensor in sparse.items():
        if id(tensor) not in dense:
            value = _dense(path, tensor)
            dense[id(tensor)] = (
                torch.nn.Parameter(value, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else value
            )
    layouts: dict[str, list[str]] = {}
    for path, tensor in sparse.items():
        is_paired = _is_semi_structured(tensor) or (tensor.ndim == 2 and is_two_of_four(dense[id(tensor)]))
        layouts.setdefault("2:4 sparsity" if is_paired else "unstructured sparsity", []).append(path)
    found = tuple(
        FoundCompression(
            kind=kind,  # type: ignore[arg-type]  # both are literals of the line above
            layers=tuple(paths),
            detail=", ".join(sorted({_layout(sparse[path]) for path in paths}))
            + f", {sum(_zeros(dense[id(sparse[path])]) for path in paths)} zeros",
            lowering="made dense, the zeros stay",
            note="ONNX has no sparse weights that runtimes compute with: the file holds the zeros, which only "
            "compression of the file removes",
        )
        for kind, paths in layouts.items()
    )
    module = private_copy(module, dense)
    replace_calls(module, _dense_call)
    return module, found


def _dense_call(call: Call) -> Call:
    """Return the dense form of what torch has for sparse operands only, or exports with a fixed batch."""
    import torch

    function, args, kwargs = call
    dense: dict[Any, Any] = {
        torch.sparse.mm: torch.mm,
        torch.smm: torch.mm,
        torch.hspmm: torch.mm,
        torch.dsmm: torch.mm,
        torch.sparse.addmm: torch.addmm,
        torch.sspaddmm: torch.addmm,
    }
    return dense.get(function, function), args, kwargs


def _is_sparse(tensor: Tensor) -> bool:
    import torch

    return tensor.layout != torch.strided or _is_semi_structured(tensor)


def _is_semi_structured(tensor: Tensor) -> bool:
    # torch's subclass, and those of torchao, which derive from it; looked up by name so that neither is imported.
    return any(base.__name__.startswith("SparseSemiStructuredTensor") for base in type(tensor.data).__mro__)


def _dense(path: str, tensor: Tensor) -> Tensor:
    try:
        return tensor.detach().to_dense().contiguous()
    except Exception as error:  # torch raises what its kernels raise; semi-structured ones exist for CUDA only
        # torch goes on with a page of its registrations.
        first = str(error).partition("\n")[0].partition(". ")[0]
        raise ModelError(
            f"the sparse weight {path} ({_layout(tensor)}) cannot be made dense on this machine "
            f"({type(error).__name__}: {first}); save the model with {path}.to_dense() where it was made"
        ) from error


def _layout(tensor: Tensor) -> str:
    return type(tensor.data).__name__ if _is_semi_structured(tensor) else str(tensor.layout).removeprefix("torch.")


def _zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())
