"""The float layer, with markers, for each dynamically quantized module of torch.ao: Linear, LSTM, GRU and their cells.

It is imported only where such a module was met: it loads torch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgedeploy.errors import ModelError
from edgedeploy.prepare.lower.packed import Weight
from edgedeploy.prepare.markers import operators

# Rows of the probe that shows whether a packed layer quantizes its input to 7 or to 8 bits.
_PROBE_ROWS = 16


class Linear(nn.Module):
    """A linear layer on stored weights; its input is quantized anew in each inference, or left float.

    Attributes:
        bits: of the input's codes; 0: the input stays float (float16 weights).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        super().__init__()
        self.weight = Weight(weight)
        self.bits = bits
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's result, of the type of `x`."""
        made = functional.linear(quantized_anew(x.float(), self.bits), self.weight(), cast("Tensor | None", self.bias))
        return made.to(x.dtype)


class Recurrent(nn.Module):
    """LSTM or GRU on stored weights: one call of torch.lstm or torch.gru for each layer.

    Each layer's input is quantized anew, as torch does; the state that goes from one step to the next is quantized by
    torch in every step, and stays float here, as ONNX keeps it inside of its node.
    """

    def __init__(self, part: Any, cells: list[tuple[Linear, Linear]]) -> None:
        super().__init__()
        self.is_lstm = part.mode == "LSTM"
        self.hidden_size, self.num_layers = int(part.hidden_size), int(part.num_layers)
        self.batch_first, self.bidirectional = bool(part.batch_first), bool(part.bidirectional)
        self.inputs = nn.ModuleList(cell[0] for cell in cells)
        self.states = nn.ModuleList(cell[1] for cell in cells)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return outputs and last state, as torch.nn.LSTM and GRU do."""
        if not isinstance(input, Tensor):
            raise ModelError(
                "a dynamically quantized LSTM or GRU is given a PackedSequence, which ONNX has no form for; pad the "
                "batch and pass a tensor"
            )
        directions = 2 if self.bidirectional else 1
        if hx is None:
            batch = input.shape[0 if self.batch_first else 1]
            zeros = input.new_zeros(self.num_layers * directions, batch, self.hidden_size)
            hx = (zeros, zeros) if self.is_lstm else zeros
        x, last = input, []
        for layer in range(self.num_layers):
            chosen = slice(layer * directions, (layer + 1) * directions)
            state = tuple(each[chosen] for each in hx) if self.is_lstm else hx[chosen]
            x, *states = self._layer(x, state, list(range(chosen.start, chosen.stop)))
            last.append(states)
        gathered = tuple(torch.cat(parts, 0) if len(parts) > 1 else parts[0] for parts in zip(*last, strict=True))
        return x, gathered if self.is_lstm else gathered[0]

    def _layer(self, x: Tensor, state: Any, cells: list[int]) -> tuple[Tensor, ...]:
        weights = []
        for cell in cells:
            ih, hh = cast(Linear, self.inputs[cell]), cast(Linear, self.states[cell])
            weights += [ih.weight(), hh.weight(), ih.bias, hh.bias]
        bits = cast(Linear, self.inputs[cells[0]]).bits
        run: Any = torch.lstm if self.is_lstm else torch.gru
        made = run(quantized_anew(x, bits), state, weights, True, 1, 0.0, False, self.bidirectional, self.batch_first)
        return cast("tuple[Tensor, ...]", made)


class Cell(nn.Module):
    """One step of an LSTM, a GRU or a plain recurrent layer, on stored weights; input and state are quantized anew.

    Source: aten/src/ATen/native/RNN.cpp, LSTMCell, GRUCell and SimpleCell.
    """

    def __init__(self, kind: str, hidden_size: int, of_input: Linear, of_state: Linear) -> None:
        super().__init__()
        self.kind, self.hidden_size = kind, hidden_size
        self.of_input, self.of_state = of_input, of_state

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the next state, as torch.nn.LSTMCell, GRUCell and RNNCell do."""
        if hx is None:
            zeros = input.new_zeros(input.shape[0], self.hidden_size)
            hx = (zeros, zeros) if self.kind == "lstm" else zeros
        if self.kind == "lstm":
            return self._lstm(input, *hx)
        if self.kind == "gru":
            return self._gru(input, hx)
        summed = self.of_input(input) + self.of_state(hx)
        return torch.relu(summed) if self.kind == "relu" else torch.tanh(summed)

    def _lstm(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        gates = (self.of_input(x) + self.of_state(hidden)).chunk(4, 1)
        enter, forget, leave = (torch.sigmoid(gates[index]) for index in (0, 1, 3))
        after = forget * cell + enter * torch.tanh(gates[2])
        return leave * torch.tanh(after), after

    def _gru(self, x: Tensor, hidden: Tensor) -> Tensor:
        of_input, of_state = self.of_input(x).chunk(3, 1), self.of_state(hidden).chunk(3, 1)
        reset, update = (torch.sigmoid(of_input[index] + of_state[index]) for index in (0, 1))
        new = torch.tanh(of_input[2] + reset * of_state[2])
        return (hidden - new) * update + new


def quantized_anew(x: Tensor, bits: int) -> Tensor:
    """Return a tensor as torch's dynamic quantization sees it: per tensor, asymmetric; 0 bits: as it is."""
    return cast(Tensor, operators().dynamic_quantize(x, bits, False, False)) if bits else x


def linear_from_packed(packed: Any, is_half: bool) -> Linear:
    """Return the layer that packed parameters of torch.ops.quantized.linear_dynamic stand for.

    Args:
        packed: the script object.
        is_half: whether it holds float16 weights.
    """
    if is_half:
        weight, bias = torch.ops.quantized.linear_unpack_fp16(packed)
        return Linear(weight, bias, 0)
    weight, bias = torch.ops.quantized.linear_unpack(packed)
    return Linear(weight, bias, input_bits(packed, weight, bias))


def input_bits(packed: Any, weight: Tensor, bias: Tensor | None) -> int:
    """Return the bits that a packed layer quantizes its input to: 7 (fbgemm reduces the range) or 8 (qnnpack).

    The engine that the parameters were packed for decides; a script object does not tell it, a seeded probe does.

    Raises:
        ModelError: the layer does neither.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, weight.shape[1], generator=draw)
    with torch.no_grad():
        seen = torch.ops.quantized.linear_dynamic(x, packed, True)
        plain = weight.dequantize()
        exact = functional.linear(x, plain, bias)
        errors = {bits: _largest(functional.linear(quantized_anew(x, bits), plain, bias) - seen) for bits in (8, 7)}
    best = min(errors, key=lambda bits: errors[bits])
    # One code of difference in one input is 1 % of the range at 7 bits; sums in another order are 1e-6.
    if errors[best] > 0.02 * max(_largest(exact), 1e-6):
        raise ModelError(
            f"a dynamically quantized layer differs from its own weights by {errors[best]:.3g} on a probe; it was "
            f"packed for an engine that edgedeploy does not know: quantize it again with fbgemm or qnnpack"
        )
    return best


def layer_of(part: Any) -> nn.Module:
    """Return the float layer for a dynamically quantized module.

    Raises:
        ModelError: a kind of module that has no form in ONNX, named.
    """
    import torch.ao.nn.intrinsic.quantized.dynamic as fused
    import torch.ao.nn.quantized.dynamic as plain

    if type(part) in (plain.Linear, fused.LinearReLU):
        made = linear_from_packed(part._packed_params._packed_params, part._packed_params.dtype == torch.float16)
        return nn.Sequential(made, nn.ReLU()) if type(part) is fused.LinearReLU else made
    if type(part) in (plain.LSTM, plain.GRU):
        cells = []
        for held in part._all_weight_values:
            kind, *_, packed = held.param.__getstate__()[0]
            cells.append(tuple(linear_from_packed(each, "fp16" in kind) for each in packed))
        return Recurrent(part, cast("list[tuple[Linear, Linear]]", cells))
    kinds = {plain.LSTMCell: "lstm", plain.GRUCell: "gru", plain.RNNCell: getattr(part, "nonlinearity", "tanh")}
    if type(part) in kinds:
        both = [
            linear_from_packed(getattr(part, f"_packed_weight_{side}"), part.weight_dtype == torch.float16)
            for side in ("ih", "hh")
        ]
        return Cell(kinds[type(part)], int(part.hidden_size), *both)
    raise ModelError(
        f"{type(part).__name__} of torch.ao.nn.quantized.dynamic has no form that ONNX can keep; leave it in float and "
        f"quantize the others"
    )


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
