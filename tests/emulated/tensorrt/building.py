"""The builder's side of the emulation: logger, network, parser, configuration, timing cache, builder, refitter."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from .names import FAULT, MAJOR, VERSION, Severity, demand_driver, enum, only

PLAN, CACHE = b"EMUTRT1\n", b"EMUTC1\n"
CAPABILITY = os.environ.get("EMULATED_COMPUTE_CAPABILITY", "8.7")
ELEMENTWISE = {
    "Add": "SUM", "Sub": "SUB", "Mul": "PROD", "Div": "DIV", "Pow": "POW", "Max": "MAX", "Min": "MIN", "Equal": "EQUAL",
    "Greater": "GREATER", "Less": "LESS",
}  # fmt: skip
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Refused by the parsers of 11.4 and RTX 1.7 (measured with supports_operator), and by 8.5's (its sources).
UNSUPPORTED = {"Unique", "DynamicQuantizeLinear", "QLinearConv"} | (
    {"HardSwish", "LayerNormalization"} if VERSION.startswith("8.5") else set()
)
TYPES = {
    TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF", TensorProto.BFLOAT16: "BF16", TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8", TensorProto.INT32: "INT32", TensorProto.BOOL: "BOOL",
    # Before 10 there is no type of 64 bits: the parser narrows.
    TensorProto.INT64: "INT64" if MAJOR >= 10 else "INT32",
}  # fmt: skip
WORDS = {"FLOAT": "Float", "HALF": "Half", "INT8": "Int8", "INT32": "Int32", "INT64": "Int64", "BOOL": "Bool"}
LAYOUTS = {
    "INT8": "Thirty-two wide channel vectorized row major Int8 format", "HALF": "Row major linear FP16 format",
    "FLOAT": "Row major linear FP32 format", "INT32": "Row major INT32 format", "INT64": "Row major INT64 format",
    "BOOL": "Row major BOOL format",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- plans


def write_plan(header: dict[str, Any], model: bytes) -> bytes:
    return PLAN + json.dumps(header, sort_keys=True).encode() + b"\n" + model


def read_plan(plan: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the ONNX of a plan; ValueError where it is none, or not whole."""
    plan = bytes(plan)
    if not plan.startswith(PLAN):
        raise ValueError("magic tag does not match")
    line, mark, model = plan[len(PLAN) :].partition(b"\n")
    header = json.loads(line)
    if not mark or hashlib.sha256(model).hexdigest() != header["onnx_sha256"]:
        raise ValueError("plan is truncated")
    return header, model


class IHostMemory(bytes):
    """Bytes that TensorRT owns; like the real one it can be read as a buffer."""

    nbytes = property(len)
    dtype = property(lambda self: enum("DataType").INT8)


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING
    INFO, VERBOSE = Severity.INFO, Severity.VERBOSE

    def __init__(self) -> None:
        self._is_made = True  # pybind11 refuses an object whose subclass did not call this

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError("a subclass has log()")


class Logger(ILogger):
    def __init__(self, min_severity: Any = Severity.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity

    def log(self, severity: Any, msg: str) -> None:
        if int(severity) <= int(self.min_severity):
            print(f"[TRT] [{severity.name[0]}] {msg}", file=sys.stderr)


class IProgressMonitor:
    def __init__(self) -> None:
        self._is_made = True


def say(logger: Any, severity: str, text: str) -> None:
    """Log as the C++ does: to an object that was made properly."""
    if not getattr(logger, "_is_made", False):
        raise TypeError("tensorrt.tensorrt.ILogger.__init__() must be called when overriding __init__")
    logger.log(getattr(Severity, severity), text)


# ---------------------------------------------------------------------------------------------------- the network


@only
class ITensor:
    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], is_input: bool = False) -> None:
        self._name, self._dtype, self._shape, self._is_input = name, dtype, shape, is_input

    name = property(lambda self: self._name)
    shape = property(lambda self: self._shape)
    dtype = property(lambda self: getattr(enum("DataType"), self._dtype))
    is_network_input = property(lambda self: self._is_input)
    is_shape_tensor = property(lambda self: False)


@only
class ILayer:
    def __init__(self, node: onnx.NodeProto, outputs: list[ITensor]) -> None:
        self._node, self._outputs = node, outputs
        self._precision: Any = None
        self._output_types: dict[int, Any] = {}

    name = property(lambda self: self._node.name)
    num_outputs = property(lambda self: len(self._outputs))
    num_inputs = property(lambda self: len(self._node.input))
    metadata = property(lambda self: f"[ONNX Layer: {self._node.name}]")
    precision_is_set = property(lambda self: self._precision is not None)

    @property
    def precision(self) -> Any:
        return self._precision

    @precision.setter
    def precision(self, value: Any) -> None:
        self._precision = value

    def get_output(self, index: int) -> ITensor | None:
        return self._outputs[index] if 0 <= index < len(self._outputs) else None

    def set_output_type(self, index: int, dtype: Any) -> None:
        self._output_types[index] = dtype

    def get_output_type(self, index: int) -> Any:
        return self._output_types.get(index, self._outputs[index].dtype)


@only
class INetworkDefinition:
    def __init__(self, logger: Any, flags: int) -> None:
        kinds = enum("NetworkDefinitionCreationFlag").__members__
        self._logger, self._flags = logger, flags
        self._is_explicit = MAJOR >= 10 or bool(flags >> int(kinds["EXPLICIT_BATCH"]) & 1)
        self._is_typed = MAJOR >= 11 or ("STRONGLY_TYPED" in kinds and bool(flags >> int(kinds["STRONGLY_TYPED"]) & 1))
        self._model = onnx.ModelProto()
        self._inputs: list[ITensor] = []
        self._outputs: list[ITensor] = []
        self._layers: list[ILayer] = []
        self.name = ""

    name = ""
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))
    num_layers = property(lambda self: len(self._layers))
    flags = property(lambda self: self._flags)

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    def get_input(self, index: int) -> ITensor | None:
        return self._inputs[index] if 0 <= index < len(self._inputs) else None

    def get_output(self, index: int) -> ITensor | None:
        return self._outputs[index] if 0 <= index < len(self._outputs) else None

    def get_layer(self, index: int) -> ILayer | None:
        return self._layers[index] if 0 <= index < len(self._layers) else None


# ---------------------------------------------------------------------------------------------------- the parser


@only
class ParserError:
    def __init__(self, code: str, desc: str, index: int, node: onnx.NodeProto | None) -> None:
        self._code, self._desc, self._index, self._node = code, desc, index, node

    def code(self) -> Any:
        return getattr(enum("ErrorCode"), self._code)

    def desc(self) -> str:
        return self._desc

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return self._node.name if self._node else ""

    def node_operator(self) -> str:
        return self._node.op_type if self._node else ""

    def file(self) -> str:
        return "onnxOpImporters.cpp"

    def line(self) -> int:
        return 0

    def func(self) -> str:
        return "importer"


class Refused(Exception):
    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@only
class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def supports_operator(self, op_name: str) -> bool:
        return op_name not in UNSUPPORTED

    def parse_from_file(self, path: str) -> bool:
        return self.parse(Path(path).read_bytes())

    def parse(self, data: bytes) -> bool:
        say(self._logger, "INFO", "-" * 64)
        model = onnx.ModelProto()
        try:
            model.ParseFromString(bytes(data))
            if not model.graph.node:
                raise ValueError("no nodes")
        except Exception:  # noqa: BLE001 - protobuf has errors of its own
            return self._fail(Refused("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model."), -1, None)
        if not self._network._is_explicit:
            return self._fail(
                Refused(
                    "INVALID_VALUE",
                    "This version of the ONNX parser only supports TensorRT INetworkDefinitions with an explicit batch "
                    "dimension. Please ensure the network was created using the EXPLICIT_BATCH "
                    "NetworkDefinitionCreationFlag.",
                ),
                -1,
                None,
            )
        try:
            inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except onnx.shape_inference.InferenceError:  # the node that is at fault is refused when its turn comes
            inferred = model
        values = {
            value.name: value for value in [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
        }
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        types = {name: value.type.tensor_type.elem_type for name, value in values.items()}
        types.update({name: tensor.data_type for name, tensor in constants.items()})
        for index, node in enumerate(model.graph.node):
            say(self._logger, "VERBOSE", f"Parsing node: {node.name} [{node.op_type}]")
            if FAULT == "segv-parse" and index == len(model.graph.node) // 2:
                os.kill(os.getpid(), signal.SIGSEGV)
            try:
                self._take(node, types, constants, index == len(model.graph.node) - 1)
            except Refused as refused:
                return self._fail(refused, index, node)
        self._fill(model, values, constants)
        return True

    def _fail(self, refused: Refused, index: int, node: onnx.NodeProto | None) -> bool:
        where = f'While parsing node number {index} [{node.op_type} -> "{node.output[0]}"]:' if node else ""
        for line in filter(None, (where, f"ERROR: {refused}")):
            say(self._logger, "ERROR", line)
        self._errors.append(ParserError(refused.code, str(refused), index, node))
        return False

    def _take(self, node: onnx.NodeProto, types: dict[str, int], constants: dict[str, Any], is_last: bool) -> None:
        if node.op_type in UNSUPPORTED or (FAULT == "parse" and is_last):
            raise Refused("UNSUPPORTED_NODE", f"No importer registered for op: {node.op_type}")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            self._take_pair(node, types, constants)
        floats = {
            TYPES[types[name]] for name in node.input if types.get(name) in (TensorProto.FLOAT, TensorProto.FLOAT16)
        }
        if len(floats) > 1 and node.op_type in ELEMENTWISE:
            first, second = (WORDS[TYPES[types[name]]] for name in node.input[:2])
            raise Refused(
                "INVALID_NODE",
                f"ElementWiseOperation {ELEMENTWISE[node.op_type]} must have same input types. But they are of types "
                f"{first} and {second}",
            )
        if len(floats) > 1 and node.op_type in PRODUCTS:
            raise Refused(
                "INVALID_NODE", f"{node.name}: input and weights must have same input types, not Half and Float"
            )

    def _take_pair(self, node: onnx.NodeProto, types: dict[str, int], constants: dict[str, Any]) -> None:
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if node.op_type == "DequantizeLinear" and types.get(node.input[0]) == TensorProto.INT32:
            raise Refused(
                "INVALID_NODE",
                f"{node.name}: input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8",
            )
        if zero is not None and zero.data_type == TensorProto.UINT8:
            raise Refused(
                "UNSUPPORTED_NODE",
                "TensorRT supports QuantizeLinear/DequantizeLinear with UINT8 zero_point only on DLA (version >= 3.16)",
            )
        if zero is not None and numpy_helper.to_array(zero).any():
            raise Refused(
                "UNSUPPORTED_NODE",
                "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported.",
            )

    def _fill(self, model: onnx.ModelProto, values: dict[str, Any], constants: dict[str, Any]) -> None:
        network = self._network
        network._model = model

        def tensor(name: str, is_input: bool = False) -> ITensor:
            kind = values[name].type.tensor_type if name in values else None
            shape = (
                tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in kind.shape.dim) if kind else ()
            )
            return ITensor(name, TYPES.get(kind.elem_type, "FLOAT") if kind else "FLOAT", shape, is_input)

        network._inputs = [tensor(value.name, True) for value in model.graph.input if value.name not in constants]
        network._outputs = [tensor(value.name) for value in model.graph.output]
        network._layers = [
            ILayer(node, [tensor(name) for name in node.output])
            for node in model.graph.node
            if node.op_type != "Constant"
        ]


# ---------------------------------------------------------------------------------------------------- configuration


@only
class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, dict[str, list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        ranges = {"min": list(min), "opt": list(opt), "max": list(max)}
        axes = zip(*ranges.values(), strict=True)
        if len({len(shape) for shape in ranges.values()}) > 1 or any(not a <= b <= c for a, b, c in axes):
            raise ValueError("Shape provided for min is inconsistent with other shapes.")
        self._shapes[input] = ranges

    def get_shape(self, input: str) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._shapes[input].values()]


@only
class ITimingCache:
    """A map from what a kernel computes to the kernel that won; it belongs to one version and one GPU."""

    def __init__(self, entries: dict[str, str], version: str = VERSION, capability: str = CAPABILITY) -> None:
        self._entries, self._version, self._capability = entries, version, capability

    def serialize(self) -> IHostMemory:
        header = {"version": self._version, "capability": self._capability, "entries": self._entries}
        return IHostMemory(CACHE + json.dumps(header, sort_keys=True).encode())

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if (input_cache._version, input_cache._capability) != (self._version, self._capability):
            return False
        self._entries.update({key: tactic for key, tactic in input_cache._entries.items() if key not in self._entries})
        return True

    def reset(self) -> bool:
        self._entries.clear()
        return True


@only
class IBuilderConfig:
    def __init__(self, logger: Any, cores: int) -> None:
        self._logger, self._cores = logger, cores
        self._flags = {"TF32"}
        self._pools: dict[str, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self._verbosity = enum("ProfilingVerbosity").LAYER_NAMES_ONLY
        self._level, self._monitor = 3, None
        self._device, self._dla_core = enum("DeviceType").GPU, -1

    def _property(name: str) -> Any:  # type: ignore[misc]
        return property(lambda self: getattr(self, name), lambda self, value: object.__setattr__(self, name, value))

    profiling_verbosity = _property("_verbosity")
    builder_optimization_level = _property("_level")
    progress_monitor = _property("_monitor")
    default_device_type = _property("_device")
    DLA_core = _property("_dla_core")
    num_optimization_profiles = property(lambda self: len(self._profiles))

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag.name)

    def get_flag(self, flag: Any) -> bool:
        return flag.name in self._flags

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(pool.name, 1 << 33)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if not profile._shapes:
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def can_run_on_DLA(self, layer: ILayer) -> bool:
        return layer._node.op_type in ("Conv", "Relu", "Add", "MaxPool", "AveragePool")

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        if not serialized_timing_cache:
            return ITimingCache({})
        try:
            if not bytes(serialized_timing_cache).startswith(CACHE):
                raise ValueError
            told = json.loads(bytes(serialized_timing_cache)[len(CACHE) :])
            return ITimingCache(dict(told["entries"]), told["version"], told["capability"])
        except (ValueError, KeyError, TypeError):
            say(self._logger, "ERROR", "Could not deserialize the timing cache")
            return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if (cache._version, cache._capability) != (VERSION, CAPABILITY) and not ignore_mismatch:
            say(self._logger, "WARNING", "Timing cache header verification failed: version or device mismatch")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


# ---------------------------------------------------------------------------------------------------- the builder


class Cancelled(Exception):
    """The progress monitor said no."""


class Failed(Exception):
    """The build ends without an engine; the text is what is logged."""


# Every build in a process times its kernels a little differently, as real ones do.
_BUILDS = [0]


@only
class Builder:
    def __init__(self, logger: Any) -> None:
        demand_driver("Builder", logger)
        self._logger = logger

    logger = property(lambda self: self._logger)
    num_DLA_cores = property(lambda self: int(os.environ.get("EMULATED_DLA_CORES", "0")))
    platform_has_fast_fp16 = property(lambda self: True)
    platform_has_fast_int8 = property(lambda self: True)
    max_threads = 1

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        if not isinstance(flags, int):
            raise TypeError("create_network(): incompatible function arguments")
        return INetworkDefinition(self._logger, flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._logger, self.num_DLA_cores)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        return True

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        _BUILDS[0] += 1
        try:
            return IHostMemory(self._compile(network, config))
        except Failed as error:
            say(self._logger, "ERROR", str(error))
        except Cancelled:
            say(self._logger, "WARNING", "The build was cancelled by its progress monitor.")
        return None

    def _compile(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes:
        model = network._model
        check_flags(network, config, self._logger)
        profile = check_profile(network, config)
        kernels = fuse(network, config)
        cache = config._cache if config._cache is not None else ITimingCache({})
        with Phases(config, len(kernels)) as phases:
            for kernel in kernels:
                say(self._logger, "VERBOSE", f"=============== Computing costs for {kernel['Name']}")
                play_fault(self._logger, kernel["Name"], config)
                kernel["TacticName"] = tactic_for(kernel, cache, config)
                phases.step()
        header = {
            "version": VERSION,
            "compute_capability": CAPABILITY,
            "typed": network._is_typed,
            "refittable": "REFIT" in config._flags,
            "verbosity": config._verbosity.name,
            "has_dla": config._device == enum("DeviceType").DLA,
            "workspace_bytes": config.get_memory_pool_limit(enum("MemoryPoolType").WORKSPACE),
            "flags": sorted(config._flags),
            "inputs": [
                {
                    "name": one.name,
                    "dtype": one._dtype,
                    "shape": list(one.shape),
                    "profiles": [profile[one.name]] if -1 in one.shape else [],
                }
                for one in network._inputs
            ],
            "outputs": [{"name": one.name, "dtype": one._dtype, "shape": list(one.shape)} for one in network._outputs],
            "layers": [described(kernel, config) for kernel in kernels],
            "onnx_sha256": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
        }
        return write_plan(header, model.SerializeToString(deterministic=True))


def described(kernel: dict[str, Any], config: IBuilderConfig) -> Any:
    """Return what a plan says of a kernel, which is its name alone where few words were asked for."""
    if config._verbosity.name != "DETAILED":
        return kernel["Name"]
    return {key: value for key, value in kernel.items() if not key.startswith("_")}


def check_flags(network: INetworkDefinition, config: IBuilderConfig, logger: Any) -> None:
    """Fail where precision flags and the network's typing do not go together."""
    precisions = sorted(config._flags & {"FP16", "INT8", "BF16", "FP8"})
    has_pairs = any(layer._node.op_type == "QuantizeLinear" for layer in network._layers)
    has_pairs |= any(layer._node.op_type == "DequantizeLinear" for layer in network._layers)
    if network._is_typed and precisions:
        raise Failed(
            "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Strongly typed networks do not take the "
            f"builder flag {precisions[0]})"
        )
    if not network._is_typed and has_pairs and "INT8" not in config._flags:
        raise Failed(
            "[network.cpp::validate::2738] Error Code 4: Internal Error (Int8 precision has been set for a layer or layer "
            "output, but int8 is not configured in the builder)"
        )
    if "INT8" in config._flags and not has_pairs:
        say(logger, "WARNING", "Calibrator is not being used. Users must provide dynamic range for all tensors that are "
            "not Int32 or Bool.")  # fmt: skip


def check_profile(network: INetworkDefinition, config: IBuilderConfig) -> dict[str, Any]:
    """Return the ranges of the dynamic inputs; fail where there are none, or others than the network's axes."""
    profile = config._profiles[0]._shapes if config._profiles else {}
    for one in network._inputs:
        if -1 not in one.shape:
            continue
        if one.name not in profile:
            raise Failed(
                "[network.cpp::validate::3126] Error Code 4: Internal Error (Network has dynamic or shape inputs, but no "
                "optimization profile has been defined.)"
            )
        for shape in profile[one.name].values():
            if len(shape) != len(one.shape) or any(
                axis not in (-1, got) for axis, got in zip(one.shape, shape, strict=True)
            ):
                raise Failed(
                    f"Error Code 4: Internal Error (profile of {one.name} does not fit its dimensions {one.shape})"
                )
    return profile


class Phases:
    """Tells a progress monitor what it wants to know."""

    def __init__(self, config: IBuilderConfig, steps: int) -> None:
        self._monitor, self._steps, self._done = config._monitor, steps, 0
        self._open: list[str] = []

    def __enter__(self) -> Phases:
        if self._monitor is not None:
            self._start("Building Engine", None, 3)
            self._monitor.step_complete("Building Engine", 0)
            self._start("Computing profile costs", "Building Engine", self._steps)
        return self

    def _start(self, name: str, parent: str | None, steps: int) -> None:
        self._monitor.phase_start(name, parent, steps)
        self._open.append(name)

    def step(self) -> None:
        if self._monitor is not None and not self._monitor.step_complete(self._open[-1], self._done):
            raise Cancelled
        self._done += 1

    def __exit__(self, *exc: object) -> None:
        while self._open:
            self._monitor.phase_finish(self._open.pop())


def play_fault(logger: Any, name: str, config: IBuilderConfig) -> None:
    """Go wrong in the way that EMULATED_FAULT asks for."""
    if FAULT == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if FAULT == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "hang":
        time.sleep(3600)
    if FAULT == "oom":
        say(
            logger,
            "ERROR",
            "[virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (no further information)",
        )
        raise Failed("[optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (Could not find any implementation "
                     f"for node {name}.)")  # fmt: skip
    if FAULT == "no-workspace":
        raise Failed("[optimizer.cpp::computeCosts::3867] Error Code 4: Internal Error (Could not find any implementation for "
                     f"node {name} due to insufficient workspace. See verbose log for requested sizes.)")  # fmt: skip
    if FAULT == "build-none":
        raise Failed("[optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (Could not find any implementation "
                     f"for node {name}.)")  # fmt: skip


def tactic_for(kernel: dict[str, Any], cache: ITimingCache, config: IBuilderConfig) -> str:
    """Return the kernel that wins: what the cache says, or one that depends on the build."""
    words = json.dumps([kernel[key] for key in ("LayerType", "Inputs", "Outputs")], sort_keys=True)
    key = hashlib.sha256(words.encode()).hexdigest()
    if key not in cache._entries:
        if "ERROR_ON_TIMING_CACHE_MISS" in config._flags:
            raise Failed(f"Error Code 1: Internal Error (Timing cache miss for {kernel['Name']})")
        if FAULT == "slow":
            time.sleep(float(os.environ.get("EMULATED_STEP_S", "0.3")))
        number = (int(key[:8], 16) + _BUILDS[0]) % 4
        operands = {"INT8": "i8i8_i8i32_f32", "HALF": "f16f16_f16f32_f32", "FLOAT": "f32f32_f32f32_f32"}
        kind = kernel["_type"]
        cache._entries[key] = f"sm87_xmma_{operands.get(kind, kind.lower())}_tile{number}"
    return cache._entries[key]


# ---------------------------------------------------------------------------------------------------- fusion, roughly


class Fusion:
    """Groups nodes as TensorRT roughly does: a product with its pairs, its activation and the rounding of its output."""

    def __init__(self, network: INetworkDefinition, config: IBuilderConfig) -> None:
        self.network, self.config = network, config
        graph = network._model.graph
        self.constants = {tensor.name for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.layers = {id(layer._node): layer for layer in network._layers}
        self.tensors = {one.name: one for layer in network._layers for one in layer._outputs}
        self.tensors.update({one.name: one for one in network._inputs})
        self.taken: set[int] = set()

    def before(self, name: str, group: list[onnx.NodeProto]) -> tuple[str, bool]:
        """Follow an operand back through casts and dequantization; return (where it comes from, whether integers)."""
        node = self.producers.get(name)
        if node is None or node.op_type not in ("Cast", "DequantizeLinear"):
            return name, False
        if node.op_type == "Cast" and self.producers.get(node.input[0], node).op_type != "DequantizeLinear":
            return name, False
        source, is_integer = self.before(node.input[0], group)
        if node.op_type == "DequantizeLinear":
            rounding = self.producers.get(source)
            if rounding is not None and rounding.op_type == "QuantizeLinear" and rounding.input[0] in self.constants:
                group.append(rounding)
            source, is_integer = node.input[0], True
        group.append(node)
        return source, is_integer

    def after(self, node: onnx.NodeProto, group: list[onnx.NodeProto]) -> onnx.NodeProto:
        """Follow the only consumer of a node's output through activation, cast and rounding; return the last."""
        wanted = ["Relu", "Clip", "Cast", "QuantizeLinear"]
        last = node
        while last.output[0] not in self.outputs:
            nexts = self.consumers.get(last.output[0], [])
            if len(nexts) != 1 or nexts[0].op_type not in wanted:
                break
            (following,) = nexts
            if following.op_type == "Cast" and not any(
                one.op_type == "QuantizeLinear" for one in self.consumers.get(following.output[0], [])
            ):
                break
            wanted = wanted[wanted.index(following.op_type) + 1 :]
            group.append(following)
            last = following
        return last

    def type_of(self, node: onnx.NodeProto, is_int8: bool) -> str:
        """Return what a node computes in."""
        declared = self.tensors[node.output[0]]._dtype
        if is_int8 and (self.network._is_typed or "INT8" in self.config._flags):
            return "INT8"
        if self.network._is_typed or declared != "FLOAT" or "FP16" not in self.config._flags:
            return declared
        layer = self.layers[id(node)]
        pinned = layer._precision is not None and "OBEY_PRECISION_CONSTRAINTS" in self.config._flags
        return layer._precision.name if pinned else "HALF"

    def kernel(self, node: onnx.NodeProto, is_lost: bool) -> dict[str, Any]:
        group: list[onnx.NodeProto] = []
        operands = [self.before(name, group) for name in node.input if name]
        is_product = node.op_type in PRODUCTS
        is_int8 = is_product and len(operands) > 1 and all(integer for _, integer in operands[:2]) and not is_lost
        group.append(node)
        last = self.after(node, group)
        self.taken.update(map(id, group))
        kind = self.type_of(node, is_int8)
        # A product that lost its integers reads what a layer of its own has made floats of.
        sources = [name for name, _ in operands] if not is_lost else list(node.input)
        sources = [name for name in sources if name not in self.constants]
        result = {
            "Name": " + ".join(self.names_of(group)),
            "LayerType": "CaskConvolution" if is_product else node.op_type,
            "Inputs": [self.port(name, kind) for name in sources],
            "Outputs": [self.port(last.output[0], "INT8" if last.op_type == "QuantizeLinear" else kind)],
            "TacticName": "",
            "StreamId": 0,
            "_type": kind,
        }
        if is_product:
            result["Weights"] = {"Type": WORDS.get(kind, kind), "Count": 0}
        if not VERSION.startswith("8.5"):
            result["Metadata"] = "\x1e".join(f"[ONNX Layer: {one.name}]" for one in group)
        return result

    def names_of(self, group: list[onnx.NodeProto]) -> list[str]:
        """Return what a kernel's name is joined of: weights that are rounded are named before what rounds them."""
        names = []
        for node in group:
            if node.op_type == "QuantizeLinear" and node.input[0] in self.constants:
                names.append(node.input[0])
            if node.op_type not in ("Cast", "DequantizeLinear"):
                names.append(node.name)
        return names or [node.name for node in group]

    def port(self, name: str, kind: str) -> dict[str, Any]:
        tensor = self.tensors.get(name)
        if tensor is not None and tensor._dtype not in ("FLOAT", "HALF"):
            kind = tensor._dtype
        layout = LAYOUTS.get(kind, kind)
        told: dict[str, Any] = {"Name": name, "Dimensions": list(tensor.shape) if tensor is not None else []}
        return (
            {**told, "Format/Datatype": layout}
            if MAJOR < 11
            else {**told, "Format": layout, "DataType": WORDS.get(kind, kind)}
        )


def fuse(network: INetworkDefinition, config: IBuilderConfig) -> list[dict[str, Any]]:
    """Return the kernels of an engine as the inspector describes them."""
    fusion = Fusion(network, config)
    nodes = [layer._node for layer in network._layers]
    kernels: dict[int, dict[str, Any]] = {}
    is_lost = FAULT == "no-int8"
    for node in nodes:
        if node.op_type in PRODUCTS:
            kernels[id(node)] = fusion.kernel(node, is_lost)
            is_lost = is_lost and kernels[id(node)]["_type"] == "INT8"
    for node in nodes:
        if id(node) not in fusion.taken and node.op_type not in ("DequantizeLinear", "Cast"):
            kernels[id(node)] = fusion.kernel(node, False)
    for node in nodes:
        if id(node) not in fusion.taken:
            kernels[id(node)] = fusion.kernel(node, False)
    found = [kernels[id(node)] for node in nodes if id(node) in kernels]
    for kernel in found:
        for port in (*kernel["Inputs"], *kernel["Outputs"]):
            if not re.search(r"\d", str(port["Dimensions"])) and math.prod(port["Dimensions"]) == 0:
                port["Dimensions"] = []
    return found


# ---------------------------------------------------------------------------------------------------- refitting


class Weights:
    """An array of weights; the pointer form came with 10."""

    def __init__(self, *arguments: Any) -> None:
        if len(arguments) == 1 and isinstance(arguments[0], np.ndarray):
            self._array = arguments[0]
        else:
            raise TypeError("__init__(): incompatible constructor arguments")


@only
class Refitter:
    def __init__(self, engine: Any, logger: Any) -> None:
        self._engine, self._logger = engine, logger
        self._model = onnx.load_model_from_string(engine._model)
        self._given: dict[str, np.ndarray] = {}

    def _initializers(self) -> dict[str, onnx.TensorProto]:
        pairs = [node for node in self._model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        scales = {name for node in pairs for name in node.input[1:]}
        kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8)
        return {
            one.name: one for one in self._model.graph.initializer if one.data_type in kinds and one.name not in scales
        }

    def get_all_weights(self) -> list[str]:
        return list(self._initializers())

    def get_missing_weights(self) -> list[str]:
        # Fused weights must be given together; here a convolution's kernel and bias.
        missing = set()
        for node in self._model.graph.node:
            own = [name for name in node.input if name in self._initializers()]
            if node.op_type in PRODUCTS and any(name in self._given for name in own):
                missing |= {name for name in own if name not in self._given}
        return sorted(missing)

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        known = self._initializers().get(name)
        if known is None or numpy_helper.to_array(known).size != weights._array.size:
            say(self._logger, "ERROR", f"Refitter: weights {name} do not fit")
            return False
        self._given[name] = weights._array
        return True

    def refit_cuda_engine(self) -> bool:
        if not self._engine._header["refittable"]:
            say(self._logger, "ERROR", "The engine was not built with the flag REFIT")
            return False
        for name, array in self._given.items():
            known = self._initializers()[name]
            shaped = array.reshape(tuple(known.dims)).astype(numpy_helper.to_array(known).dtype)
            known.CopyFrom(numpy_helper.from_array(shaped, name))
        model = self._model.SerializeToString(deterministic=True)
        header = {**self._engine._header, "onnx_sha256": hashlib.sha256(model).hexdigest()}
        self._engine.__init__(self._engine._logger, header, model)
        return True


class OnnxParserRefitter:
    """Takes the weights for a Refitter out of an ONNX file; only versions that have it get to see it."""

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter, self._logger = refitter, logger

    def refit_from_file(self, path: str) -> bool:
        known = self._refitter._initializers()
        for tensor in onnx.load(path).graph.initializer:
            if tensor.name in known:
                array = numpy_helper.to_array(tensor)
                if not self._refitter.set_named_weights(tensor.name, Weights(np.ascontiguousarray(array))):
                    return False
        return True
