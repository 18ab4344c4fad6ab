"""The execution side of the emulated TensorRT: a plan is read, and its ONNX computed by onnxruntime in the GPU's memory.

The memory is that of the emulated CUDA runtime (cuda_stubs.c). An inference is a host function that its stream is given,
so that a captured graph computes again whenever it is launched. What the real one checks is checked here, and said in
its words.

Of a plan's header (building.py writes it) it reads "version", "compute_capability", "layers" as the engine inspector
describes them, "inputs" and "outputs", and where they are there an input's "location" and "device_memory_bytes".
EMULATED_FAULT=capture makes every inference do what no graph can hold, EMULATED_FAULT=enqueue makes it fail.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
import traceback
import weakref
from typing import Any

from .building import IHostMemory, ILogger, read_plan, write_plan
from .names import MAJOR, VERSION, demand_driver, enum, only

# What a context asks of the GPU's memory where the plan does not say it.
DEVICE_MEMORY_BYTES = 1 << 20
NUMPY = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "BOOL": "bool", "UINT8": "uint8",
    "INT64": "int64",
}  # fmt: skip


def cuda() -> ctypes.CDLL:
    """Return the emulated CUDA runtime."""
    for name in ("libcudart.so.12", "libcudart.so.11.0"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.cudaLaunchHostFunc.argtypes = [ctypes.c_void_p] * 3
        library.cudaStreamSynchronize.argtypes = [ctypes.c_void_p]
        library.cudaStreamIsCapturing.argtypes = [ctypes.c_void_p] * 2
        library.cudaFree.argtypes = [ctypes.c_void_p]
        library.cudaMalloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        return library
    raise RuntimeError("the emulated CUDA runtime is not on LD_LIBRARY_PATH")


def compute_capability() -> str:
    """Return the compute capability that is emulated."""
    return os.environ.get("EMULATED_COMPUTE_CAPABILITY", "8.7")


def complain(logger: Any, text: str) -> None:
    """Log an error, as the real one does where it returns None or False."""
    logger.log(ILogger.ERROR, text)


@only
class IProfiler:
    """What a program derives from to hear how long layers took."""

    def __init__(self) -> None:
        self._is_made = True

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError("a subclass has report_layer_time()")


class IOutputAllocator:
    """What a program derives from to make room for outputs whose sizes only an inference tells."""

    def __init__(self) -> None:
        self._is_made = True


@only
class Runtime:
    """Reads plans."""

    logger: Any = None
    DLA_core = -1
    engine_host_code_allowed = False
    num_DLA_cores = 0

    def __init__(self, logger: Any) -> None:
        demand_driver("Runtime", logger)
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        try:
            header, model = read_plan(serialized_engine)
            if header["version"] != VERSION:
                raise ValueError(
                    "Serialization assertion stdVersionRead == serializationVersion failed.Version tag does not match. "
                    f"Note: Current Version: {VERSION}, Serialized Engine Version: {header['version']}"
                )
            if header["compute_capability"] != compute_capability():
                raise ValueError(
                    "The engine plan file is generated on an incompatible device, expecting compute "
                    f"{compute_capability()} got compute {header['compute_capability']}, please rebuild."
                )
            return ICudaEngine(self.logger, header, model)
        except ValueError as error:
            complain(self.logger, f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization ({error})")
            return None


class IRuntimeConfig:
    """How a context is to run."""

    def __setattr__(self, name: str, value: object) -> None:
        if not hasattr(type(self), name):
            raise AttributeError(f"'IRuntimeConfig' object has no attribute {name!r}")
        object.__setattr__(self, name, value)


# That of TensorRT-RTX has more to say.
RUNTIME_CONFIG: type[IRuntimeConfig] = IRuntimeConfig


@only
class ICudaEngine:
    """A plan that was read."""

    def __init__(self, logger: Any, header: dict[str, Any], model: bytes) -> None:
        import onnxruntime

        self._logger, self._header, self._model = logger, header, model
        self._ports = {port["name"]: port for port in (*header["inputs"], *header["outputs"])}
        self._inputs = [port["name"] for port in header["inputs"]]
        self._users: weakref.WeakValueDictionary[int, IExecutionContext] = weakref.WeakValueDictionary()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    name = "emulated"
    refittable = property(lambda self: bool(self._header.get("refittable", False)))
    num_io_tensors = property(lambda self: len(self._ports))
    num_layers = property(lambda self: len(self._header["layers"]))
    device_memory_size = property(lambda self: self._header.get("device_memory_bytes", DEVICE_MEMORY_BYTES))
    device_memory_size_v2 = device_memory_size

    @property
    def num_optimization_profiles(self) -> int:
        return max([1, *(len(port.get("profiles") or ()) for port in self._header["inputs"])])

    def get_tensor_name(self, index: int) -> str:
        return list(self._ports)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = enum("TensorIOMode")
        if name not in self._ports:
            return modes.NONE
        return modes.INPUT if name in self._inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(enum("DataType"), self._ports[name]["dtype"])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._ports[name]["shape"])

    def get_tensor_location(self, name: str) -> Any:
        return getattr(enum("TensorLocation"), self._ports[name].get("location", "DEVICE"))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        port = self._ports[name]
        if not port.get("profiles"):
            return [tuple(port["shape"])] * 3
        return [tuple(port["profiles"][profile_index][key]) for key in ("min", "opt", "max")]

    def is_shape_inference_io(self, name: str) -> bool:
        return bool(self._ports[name].get("location") == "HOST")

    def serialize(self) -> IHostMemory:
        return IHostMemory(write_plan(self._header, self._model))

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_runtime_config(self) -> IRuntimeConfig:
        return RUNTIME_CONFIG()

    def create_execution_context(self, runtime_config: IRuntimeConfig | None = None) -> IExecutionContext | None:
        if runtime_config is not None and not isinstance(runtime_config, IRuntimeConfig):
            raise TypeError("create_execution_context(): incompatible function arguments")
        try:
            return IExecutionContext(self)
        except MemoryError as error:
            complain(
                self._logger, f"[executionContext.cpp::initializeExecutionContext] Error Code 2: OutOfMemory ({error})"
            )
            return None

    def _output_shapes(self, inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return what shape each output has for inputs of these shapes; -1: only the data decide.

        Raises:
            RuntimeError: the model cannot compute with them.
        """
        import onnx

        key = repr(sorted(inputs.items()))
        if key in self._shapes:
            return self._shapes[key]
        model = onnx.load_model_from_string(self._model)
        for value in model.graph.input:
            for axis, size in zip(value.type.tensor_type.shape.dim, inputs.get(value.name, ()), strict=False):
                axis.dim_value = size
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]
        try:
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            raise RuntimeError(f"infer_shapes error code: -1 ({error})") from error
        found = {}
        for value in inferred.graph.output:
            axes = value.type.tensor_type.shape.dim
            found[value.name] = tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in axes)
        self._shapes[key] = found
        return found


@only
class EngineInspector:
    """Says what layers an engine has."""

    execution_context: Any = None

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, form: Any) -> str:
        layers = self._engine._header["layers"]
        if form == enum("LayerInformationFormat").ONELINE:
            return "\n".join(layer_name(layer) for layer in layers)
        if MAJOR >= 11:
            return json.dumps({"Layers": layers, "I/O Tensors": [{"Name": name} for name in self._engine._ports]})
        return json.dumps({"Layers": layers, "Bindings": list(self._engine._ports)})

    def get_layer_information(self, index: int, form: Any) -> str:
        layer = self._engine._header["layers"][index]
        return layer_name(layer) if form == enum("LayerInformationFormat").ONELINE else json.dumps(layer)


def layer_name(layer: Any) -> str:
    """Return the name of a layer, which is all there is of it without verbosity."""
    return str(layer["Name"] if isinstance(layer, dict) else layer)


@only
class IExecutionContext:
    """One way through an engine, with shapes and addresses."""

    engine: Any = None
    name = ""
    profiler: Any = None
    enqueue_emits_profile = True
    active_optimization_profile = -1

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self._cuda = cuda()
        memory, size = ctypes.c_void_p(), engine._header.get("device_memory_bytes", DEVICE_MEMORY_BYTES)
        if self._cuda.cudaMalloc(ctypes.byref(memory), size) != 0:
            self._cuda.cudaGetLastError()
            raise MemoryError(f"Requested size was {size} bytes.")
        weakref.finalize(self, self._cuda.cudaFree, memory.value)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._kernels: list[Any] = []
        self._last_ms = 0.0
        self._choose(0)

    def _choose(self, profile: int) -> bool:
        """Take a profile; before TensorRT 10 no two contexts could have the same one."""
        other = self.engine._users.get(profile)
        if MAJOR < 10 and other is not None and other is not self:
            complain(self.engine._logger, f"Profile {profile} has been chosen by another IExecutionContext.")
            return False
        self.active_optimization_profile = profile
        self.engine._users[profile] = self
        self._shapes = {}
        return True

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._refuse("setOptimizationProfileAsync", f"profile {profile_index} exists")
        return self._choose(profile_index)

    def _refuse(self, function: str, condition: str) -> bool:
        complain(
            self.engine._logger,
            f"[executionContext.cpp::{function}] Error Code 3: API Usage Error (Parameter check failed, condition: "
            f"{condition})",
        )
        return False

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if name not in self.engine._inputs:
            return self._refuse("setInputShape", f"{name} is an input")
        if self.active_optimization_profile < 0:
            return self._refuse("setInputShape", "an optimization profile is chosen")
        wanted, shape = self.engine._ports[name]["shape"], tuple(shape)
        least, _, most = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        fits = len(shape) == len(wanted) and all(
            low <= axis <= high for low, axis, high in zip(least, shape, most, strict=True)
        )
        if not fits:
            return self._refuse("setInputShape", f"{shape} of {name} is within {least} and {most}")
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine._ports:
            return self._refuse("setTensorAddress", f"{name} is an input or output")
        if not isinstance(memory, int):
            raise TypeError("set_tensor_address(): incompatible function arguments")
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        if name not in self.engine._ports or name in self.engine._inputs:
            return self._refuse("setOutputAllocator", f"{name} is an output")
        self._allocators[name] = output_allocator
        return True

    def _input_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._shapes.get(name, tuple(self.engine._ports[name]["shape"])) for name in self.engine._inputs}

    def infer_shapes(self) -> list[str]:
        missing = [name for name, shape in self._input_shapes().items() if -1 in shape]
        if not missing:
            self.engine._output_shapes(self._input_shapes())
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shapes = self._input_shapes()
        if name in shapes:
            return shapes[name]
        if any(-1 in shape for shape in shapes.values()):
            return tuple(self.engine._ports[name]["shape"])
        return tuple(self.engine._output_shapes(shapes)[name])

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        """Return a tensor's memory as an array."""
        import numpy as np

        dtype = np.dtype(NUMPY[self.engine._ports[name]["dtype"]])
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_ubyte * max(1, size)).from_address(self._addresses[name])
        return np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)

    def _compute(self, shapes: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]) -> None:
        """Compute with what lies in memory now."""
        started_s = time.perf_counter()
        session, feeds = self.engine._session, {}
        for node in session.get_inputs():
            # TensorRT 8 has no int64: what is that in the ONNX it takes as int32.
            array = self._array(node.name, shapes[node.name])
            feeds[node.name] = array.astype("int64") if node.type == "tensor(int64)" else array.copy()
        for node, array in zip(session.get_outputs(), session.run(None, feeds), strict=True):
            if -1 in outputs[node.name]:
                self._hand_over(node.name, array)
            self._array(node.name, array.shape)[...] = array
        self._last_ms = (time.perf_counter() - started_s) * 1e3

    def _hand_over(self, name: str, array: Any) -> None:
        """Have the program make room for an output whose size is known now."""
        import numpy as np

        allocator = self._allocators[name]
        size = int(array.size) * np.dtype(NUMPY[self.engine._ports[name]["dtype"]]).itemsize
        arguments = (name, self._addresses.get(name, 0), size, 256)
        if MAJOR >= 10 and hasattr(allocator, "reallocate_output_async"):
            address = allocator.reallocate_output_async(*arguments, 0)
        else:
            address = allocator.reallocate_output(*arguments)
        if not address:
            raise MemoryError(f"the output allocator gave no memory for {name}")
        self._addresses[name] = address
        allocator.notify_shape(name, tuple(array.shape))

    def execute_async_v3(self, stream_handle: int) -> bool:
        shapes = self._input_shapes()
        if self.infer_shapes():
            return self._refuse("enqueueV3", "all shapes are specified")
        outputs = self.engine._output_shapes(shapes)
        for name in self.engine._ports:
            is_open = -1 in outputs.get(name, ())
            if not (self._allocators.get(name) if is_open else self._addresses.get(name)):
                return self._refuse("enqueueV3", f"the address or allocator of {name} is set")
        fault = os.environ.get("EMULATED_FAULT", "")
        if fault == "enqueue":
            complain(
                self.engine._logger,
                "[executionContext.cpp::enqueueV3] Error Code 7: Internal Error (an emulated fault)",
            )
            return False
        waits = fault == "capture" or any(-1 in shape for shape in outputs.values())
        code = self._cuda.cudaStreamSynchronize(stream_handle) if waits else 0
        if code != 0:
            complain(
                self.engine._logger, f"[executionContext.cpp::enqueueV3] Error Code 1: Cuda Runtime (CUDA error {code})"
            )
            return False
        return self._launch(stream_handle, shapes, outputs)

    def _launch(
        self, stream_handle: int, shapes: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]
    ) -> bool:
        """Give the stream the computation; a failure of one that has run already is said at once."""
        failed: list[Exception] = []
        is_captured = self._is_capturing(stream_handle)
        context = weakref.ref(self)  # a cycle would keep the context's memory

        def kernel(_data: int | None) -> None:
            try:
                context()._compute(shapes, outputs)  # type: ignore[union-attr]
            except Exception as error:  # noqa: BLE001 - said by whoever gave the stream this work
                failed.append(error)
                if is_captured:  # nobody is there to say it
                    traceback.print_exc()
                    os.abort()

        called = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)
        self._kernels.append(called)  # a graph may call it for as long as the context lives
        # ctypes.cast would leave a cycle behind, and the context's memory with it.
        address = ctypes.c_void_p.from_buffer(called).value
        code = self._cuda.cudaLaunchHostFunc(stream_handle, address, None)
        if code != 0 or failed:
            why = failed[0] if failed else f"CUDA error {code}"
            complain(self.engine._logger, f"[executionContext.cpp::enqueueV3] Error Code 7: Internal Error ({why})")
            return False
        if not is_captured:
            self._kernels.pop()
            if self.profiler is not None and self.enqueue_emits_profile:
                self.report_to_profiler()
        return True

    def _is_capturing(self, stream_handle: int) -> bool:
        status = ctypes.c_int()
        self._cuda.cudaStreamIsCapturing(stream_handle, ctypes.byref(status))
        return status.value != 0

    def report_to_profiler(self) -> bool:
        layers = self.engine._header["layers"]
        for layer in layers:
            self.profiler.report_layer_time(layer_name(layer), self._last_ms / len(layers))
        return True
