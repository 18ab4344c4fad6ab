"""The device half of TensorRT and of TensorRT-RTX: named tensors, one stream of GPU 0.

Importing it raises where there is no driver, no GPU, no CUDA runtime or no TensorRT. The driver is asked first: without
one, TensorRT's objects end the whole process (measured: Runtime of 8.6, deserializing with 11.4).

What differs between TensorRT 8.5 and 11 is asked by hasattr, never by the version. Tensors' bytes are converted here
without numpy, so that a device needs TensorRT's Python and nothing else.
"""

import collections
import contextlib
import ctypes
import glob
import importlib
import importlib.util
import itertools
import math
import os
import statistics
import struct
import sys

MODULES = ("tensorrt", "tensorrt_rtx")
# TensorRT's name of a type -> ours.
TYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
# Our name of a type -> its letter in the module struct, which is exact about what fits.
LETTERS = {
    "float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "int8": "b",
    "uint8": "B", "bool": "?",
}  # fmt: skip
# What data may be where the engine has another type: TensorRT 8 has no int64, and none has float64.
WIDER = {"int32": ("int64",), "float32": ("float64",)}
# From cuda.h and driver_types.h. Neither number nor meaning has changed from CUDA 10.2 to 13.0.
MAJOR, MINOR = 75, 76  # CUdevice_attribute: the two parts of the compute capability
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY and cudaErrorMemoryAllocation
SPIN, BLOCKING, SCHEDULE_MASK = 1, 4, 7  # cudaDeviceScheduleSpin, ...BlockingSync, ...Mask
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
THIS_THREAD = 1  # cudaStreamCaptureModeThreadLocal: what other threads do meanwhile does not disturb
# The newest first; one that is too new for the driver says so when it is asked for its devices.
RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so.10.2", "libcudart.so")
# Where NVIDIA's wheels and a toolkit without an entry in the linker's cache keep it.
IN_WHEELS = ("nvidia/*/lib", "tensorrt_libs", "tensorrt_rtx_libs")
IN_TOOLKIT = ("/usr/local/cuda/lib64", "/usr/local/cuda/targets/*/lib")
LOG_LINES = 8
# Parts of what TensorRT logs where the GPU's memory is full.
FULL = ("out of memory", "outofmemory", "could not be allocated")


def absent(sentence):
    """Return the error of a device that lacks something, whose text says what to do about it."""
    error = ImportError(sentence)
    error.says_what_to_do = True
    return error


class Driver:
    """NVIDIA's driver: whether there is a GPU here at all, and which."""

    def __init__(self):
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise absent(
                "there is no NVIDIA driver here (%s); install one (on a Jetson it comes with JetPack), and start a "
                "container with --runtime nvidia or --gpus all" % error
            ) from error
        self.call("cuInit", ctypes.c_uint(0))
        if not self.number("cuDeviceGetCount"):
            raise absent("NVIDIA's driver sees no GPU here; check nvidia-smi, and CUDA_VISIBLE_DEVICES if it is set")

    def call(self, name, *arguments):
        """Call a function of the driver.

        Raises:
            ImportError: with the driver's own words.
        """
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            said = text.value.decode("utf-8", "replace") if text.value else "unknown error"
            raise absent(
                "NVIDIA's driver is here and does not work: %s says %r (CUDA error %d); check that nvidia-smi works "
                "for this user, and on a Jetson that it is in the groups video and render" % (name, said, code)
            )

    def number(self, name, *arguments):
        """Return what a function writes to its first argument, an int."""
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def version(self):
        """Return the newest CUDA that the driver serves, "12.6"."""
        number = self.number("cuDriverGetVersion")
        return "%d.%d" % (number // 1000, number % 1000 // 10)

    def compute_capability(self):
        """Return the compute capability of GPU 0, "8.7"."""
        device = ctypes.c_int(self.number("cuDeviceGet", ctypes.c_int(0)))
        return ".".join(str(self.number("cuDeviceGetAttribute", ctypes.c_int(part), device)) for part in (MAJOR, MINOR))


def runtime_candidates():
    """Yield names and paths under which CUDA's runtime may be found, best first."""
    yield from RUNTIMES
    folders = [os.path.join(folder, place) for folder in sys.path for place in IN_WHEELS] + list(IN_TOOLKIT)
    for folder in folders:
        yield from sorted(glob.glob(os.path.join(folder, "libcudart.so.*")), reverse=True)


def find_cuda_runtime(driver):
    """Return CUDA's runtime that this driver serves, or a sentence why there is none."""
    refused = []
    for name in runtime_candidates():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        code = library.cudaGetDeviceCount(ctypes.byref(ctypes.c_int()))
        if code == 0:
            return CudaRuntime(library, os.path.basename(name)), ""
        library.cudaGetErrorString.restype = ctypes.c_char_p
        said = library.cudaGetErrorString(ctypes.c_int(code)).decode("utf-8", "replace")
        refused.append("%s says %r" % (name, said))
    if refused:
        return None, "the driver serves CUDA up to %s, and no CUDA runtime that was found works with it (%s)" % (
            driver.version(), "; ".join(refused),
        )  # fmt: skip
    major = int(driver.version().partition(".")[0])
    package = "nvidia-cuda-runtime" + ("-cu%d" % major if major < 13 else "")
    return None, (
        "there is no CUDA runtime here (%s), which buffers are made with; pip install %s, or install the toolkit"
        % (RUNTIMES[-1], package)
    )


def import_module(name):
    """Return TensorRT's Python module of that name.

    Raises:
        ImportError: it is not installed, or what it needs is not.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise absent(
            "%s has no module %r; on a Jetson: apt install python3-libnvinfer, and use the system's python; elsewhere: "
            "pip install %s" % (sys.executable, name, name.replace("_", "-"))
        ) from error
    except (ImportError, OSError) as error:
        raise absent("the module %r is here and cannot be loaded: %s" % (name, error)) from error


def import_any():
    """Return the module that is installed; TensorRT where both are."""
    there = [name for name in MODULES if importlib.util.find_spec(name) is not None]
    return import_module((there or MODULES)[0])


class CudaRuntime:
    """CUDA's runtime by ctypes: memory, one stream, events and graphs. Addresses and handles are plain ints."""

    SIGNATURES = {
        "cudaSetDeviceFlags": [ctypes.c_uint],
        "cudaGetDeviceFlags": [ctypes.c_void_p],
        "cudaGetLastError": [],
        "cudaMalloc": [ctypes.c_void_p, ctypes.c_size_t],
        "cudaFree": [ctypes.c_void_p],
        "cudaHostAlloc": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint],
        "cudaFreeHost": [ctypes.c_void_p],
        "cudaMemGetInfo": [ctypes.c_void_p, ctypes.c_void_p],
        "cudaMemcpyAsync": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p],
        "cudaStreamCreate": [ctypes.c_void_p],
        "cudaStreamSynchronize": [ctypes.c_void_p],
        "cudaStreamDestroy": [ctypes.c_void_p],
        "cudaEventCreate": [ctypes.c_void_p],
        "cudaEventRecord": [ctypes.c_void_p, ctypes.c_void_p],
        "cudaEventElapsedTime": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
        "cudaEventDestroy": [ctypes.c_void_p],
        "cudaStreamBeginCapture": [ctypes.c_void_p, ctypes.c_int],
        "cudaStreamEndCapture": [ctypes.c_void_p, ctypes.c_void_p],
        "cudaGraphLaunch": [ctypes.c_void_p, ctypes.c_void_p],
        "cudaGraphDestroy": [ctypes.c_void_p],
        "cudaGraphExecDestroy": [ctypes.c_void_p],
    }
    # cudaGraphInstantiate has five arguments up to CUDA 11 and three from 12 on; this one, of 11.4, is the same in all.
    WITH_FLAGS = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulonglong]
    FIVE = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def __init__(self, library, name):
        self.library, self.name = library, name
        self.library.cudaGetErrorString.restype = ctypes.c_char_p
        self.library.cudaGetErrorString.argtypes = [ctypes.c_int]
        for function, types in self.SIGNATURES.items():
            getattr(self.library, function).argtypes = types
            getattr(self.library, function).restype = ctypes.c_int
        self.has_flags = hasattr(library, "cudaGraphInstantiateWithFlags")
        if self.has_flags:
            library.cudaGraphInstantiateWithFlags.argtypes = self.WITH_FLAGS
        else:
            library.cudaGraphInstantiate.argtypes = self.FIVE

    def call(self, name, *arguments):
        """Call a function; an error number becomes a sentence."""
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise self.error(name, code)

    def error(self, name, code):
        """Return the exception for an error number, and take it back from CUDA, which would say it again."""
        self.library.cudaGetLastError()
        said = self.library.cudaGetErrorString(code).decode("utf-8", "replace")
        if code == OUT_OF_MEMORY:
            return MemoryError("%s: %s" % (name, said))
        return RuntimeError("%s failed: %s (CUDA error %d)" % (name, said, code))

    def handle(self, name, *arguments):
        """Return what a function writes to its first argument: an address or a handle."""
        value = ctypes.c_void_p()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def instantiate(self, graph):
        """Return an executable graph."""
        if self.has_flags:
            return self.handle("cudaGraphInstantiateWithFlags", graph, 0)
        return self.handle("cudaGraphInstantiate", graph, None, None, 0)


class CudartBuffers:
    """Memory on both sides, one stream, events and graphs, by CUDA's runtime."""

    def __init__(self, runtime, is_spinning):
        self.runtime = runtime
        self.name = runtime.name
        self.schedule(SPIN if is_spinning else BLOCKING)
        self.stream = runtime.handle("cudaStreamCreate")
        # What every inference calls, looked up once.
        self.copy, self.synchronize = runtime.library.cudaMemcpyAsync, runtime.library.cudaStreamSynchronize
        self.record_event, self.launch_graph = runtime.library.cudaEventRecord, runtime.library.cudaGraphLaunch

    def schedule(self, flag):
        """Decide how a thread waits for the GPU, which holds for the whole process."""
        code = self.runtime.library.cudaSetDeviceFlags(flag)
        if code == 0:
            return
        # CUDA 11 refuses once its context is there; that of an earlier session may be as we want it.
        error = self.runtime.error("cudaSetDeviceFlags", code)
        flags = ctypes.c_uint()
        self.runtime.call("cudaGetDeviceFlags", ctypes.byref(flags))
        if flags.value & SCHEDULE_MASK != flag:
            raise RuntimeError(
                "spin_wait cannot be changed once a process uses the GPU (%s); open the session in a process of its own"
                % error
            )

    def close(self):
        """Give the stream back; what was allocated must have been freed."""
        self.runtime.call("cudaStreamDestroy", self.stream)

    def memory(self):
        """Return (free, total) bytes of the GPU's memory."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.runtime.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size):
        """Return the address of memory on the GPU."""
        try:
            return self.runtime.handle("cudaMalloc", size)
        except MemoryError as error:
            raise MemoryError(no_room(size, *self.memory())) from error

    def free(self, address):
        """Give memory on the GPU back."""
        self.runtime.call("cudaFree", address)

    def allocate_host(self, size):
        """Return the address of memory of this process that the GPU can reach."""
        try:
            return self.runtime.handle("cudaHostAlloc", size, 0)
        except MemoryError as error:
            raise MemoryError("there is no room for %d bytes of pinned memory; bind a smaller batch" % size) from error

    def free_host(self, address):
        """Give pinned memory back."""
        self.runtime.call("cudaFreeHost", address)

    def upload(self, device, host, size):
        """Start a copy to the GPU."""
        code = self.copy(device, host, size, TO_DEVICE, self.stream)
        if code:
            raise self.runtime.error("cudaMemcpyAsync", code)

    def download(self, host, device, size):
        """Start a copy from the GPU."""
        code = self.copy(host, device, size, TO_HOST, self.stream)
        if code:
            raise self.runtime.error("cudaMemcpyAsync", code)

    def wait(self):
        """Wait until everything that was started is done."""
        code = self.synchronize(self.stream)
        if code:
            raise self.runtime.error("cudaStreamSynchronize", code)

    def event(self):
        """Return a new event."""
        return self.runtime.handle("cudaEventCreate")

    def record(self, event):
        """Have the GPU note the time when it comes to here."""
        code = self.record_event(event, self.stream)
        if code:
            raise self.runtime.error("cudaEventRecord", code)

    def elapsed_ms(self, start, end):
        """Return the milliseconds between two recorded events, resolved to about half a microsecond."""
        value = ctypes.c_float()
        self.runtime.call("cudaEventElapsedTime", ctypes.byref(value), start, end)
        return value.value

    def free_event(self, event):
        """Give an event back."""
        self.runtime.call("cudaEventDestroy", event)

    def capture(self, work):
        """Return a graph of what `work` starts on the stream.

        Raises:
            RuntimeError: something of it cannot be captured.
        """
        self.runtime.call("cudaStreamBeginCapture", self.stream, THIS_THREAD)
        try:
            work()
        except BaseException:
            # The stream is of no use before the capture has ended, which itself fails where the work did.
            self.runtime.library.cudaStreamEndCapture(self.stream, ctypes.byref(ctypes.c_void_p()))
            self.runtime.library.cudaGetLastError()
            raise
        graph = ctypes.c_void_p()
        self.runtime.call("cudaStreamEndCapture", self.stream, ctypes.byref(graph))
        try:
            return self.runtime.instantiate(graph)
        finally:
            self.runtime.call("cudaGraphDestroy", graph)

    def launch(self, graph):
        """Start a graph."""
        code = self.launch_graph(graph, self.stream)
        if code:
            raise self.runtime.error("cudaGraphLaunch", code)

    def free_graph(self, graph):
        """Give a graph back."""
        self.runtime.call("cudaGraphExecDestroy", graph)


class PycudaBuffers:
    """The same by pycuda, in the GPU's primary context, which is the one that TensorRT uses."""

    def __init__(self, driver, is_spinning):
        try:
            self.cuda = importlib.import_module("pycuda.driver")
        except ImportError as error:
            raise ValueError(
                "buffers is pycuda, which %s cannot load (%s); pip install pycuda there, or leave buffers out"
                % (sys.executable, error)
            ) from error
        self.name = "pycuda"
        # pycuda has no call for this; the function has borne the ending since CUDA 11.
        flags = getattr(driver.library, "cuDevicePrimaryCtxSetFlags_v2", driver.library.cuDevicePrimaryCtxSetFlags)
        code = flags(ctypes.c_int(0), ctypes.c_uint(SPIN if is_spinning else BLOCKING))
        if code != 0:
            raise RuntimeError(
                "spin_wait cannot be changed once a process uses the GPU (CUDA error %d); open the session in a "
                "process of its own" % code
            )
        self.cuda.init()
        self.context = self.cuda.Device(0).retain_primary_context()
        self.context.push()
        self.queue = self.cuda.Stream()
        self.stream = int(self.queue.handle)
        self.kept = {}  # pycuda frees what nobody refers to

    def close(self):
        """Give the stream and the context back."""
        self.kept.clear()
        self.queue = None
        self.context.pop()

    def memory(self):
        """Return (free, total) bytes of the GPU's memory."""
        free, total = self.cuda.mem_get_info()
        return int(free), int(total)

    def allocate(self, size):
        """Return the address of memory on the GPU."""
        try:
            made = self.cuda.mem_alloc(size)
        except self.cuda.MemoryError as error:
            raise MemoryError(no_room(size, *self.memory())) from error
        self.kept[int(made)] = made
        return int(made)

    def free(self, address):
        """Give memory on the GPU back."""
        self.kept.pop(address).free()

    def allocate_host(self, size):
        """Return the address of memory of this process that the GPU can reach."""
        try:
            made = self.cuda.pagelocked_empty(size, "uint8")
        except self.cuda.MemoryError as error:
            raise MemoryError("there is no room for %d bytes of pinned memory; bind a smaller batch" % size) from error
        self.kept[made.ctypes.data] = made
        return made.ctypes.data

    def free_host(self, address):
        """Give pinned memory back."""
        del self.kept[address]

    def upload(self, device, host, size):
        """Start a copy to the GPU."""
        self.cuda.memcpy_htod_async(device, self.kept[host][:size], self.queue)

    def download(self, host, device, size):
        """Start a copy from the GPU."""
        self.cuda.memcpy_dtoh_async(self.kept[host][:size], device, self.queue)

    def wait(self):
        """Wait until everything that was started is done."""
        self.queue.synchronize()

    def event(self):
        """Return a new event."""
        return self.cuda.Event()

    def record(self, event):
        """Have the GPU note the time when it comes to here."""
        event.record(self.queue)

    def elapsed_ms(self, start, end):
        """Return the milliseconds between two recorded events."""
        return start.time_till(end)

    def free_event(self, event):
        """Leave an event to pycuda, which gives back what nobody refers to."""


def no_room(size, free, total):
    """Say that the GPU's memory is full."""
    return (
        "the GPU has no room for %d more bytes (%d of its %d are free); close what else uses it, or bind a smaller "
        "batch" % (size, free, total)
    )


class Tensor:
    """One input or output of the model, and where it lies in memory.

    Attributes:
        name: the model's.
        tensor: the engine's name of it.
        dtype: the engine's.
        model_dtype: the model's, where the host says it, else the engine's.
        shape: the engine's, -1 where the caller chooses.
        is_on_host: whether the engine reads or writes it in this process's memory: sizes that are computed with.
        host, device: addresses, None before the first bind.
        size: bytes of the inputs that are bound.
        now: the shape that is bound.
    """

    def __init__(self, name, tensor, dtype, model_dtype, shape, is_on_host):
        self.name, self.tensor, self.dtype, self.model_dtype = name, tensor, dtype, model_dtype
        self.shape, self.is_on_host = shape, is_on_host
        self.host = self.device = None
        self.host_room = self.device_room = self.size = 0
        self.now = None
        self.allocator = None

    def bytes_of(self, shape):
        """Return how many bytes a shape takes; at least one, for an address is needed in any case."""
        return max(1, count_of(shape) * struct.calcsize(LETTERS[self.dtype]))

    def converted(self, data, dtype, shape):
        """Return an input's bytes in the engine's type.

        Raises:
            ValueError: another type, too few bytes, or values that the engine's type cannot hold.
        """
        if dtype != self.dtype and dtype not in WIDER.get(self.dtype, ()):
            raise ValueError("input %r takes %s, not %s" % (self.name, self.model_dtype, dtype))
        data = memoryview(data).cast("B")
        if len(data) != count_of(shape) * struct.calcsize(LETTERS[dtype]):
            raise ValueError(
                "input %r holds %d bytes, which is not the shape %s of %s" % (self.name, len(data), list(shape), dtype)
            )
        try:
            return recoded(data, dtype, self.dtype)
        except (struct.error, OverflowError) as error:
            raise ValueError(
                "input %r holds values beyond %s, which the engine has" % (self.name, self.dtype)
            ) from error


def count_of(shape):
    """Return how many values a shape holds."""
    count = 1
    for axis in shape:
        count *= axis
    return count


def recoded(data, dtype, wanted):
    """Return values of one type as bytes of another."""
    if dtype == wanted:
        return data
    count = len(data) // struct.calcsize(LETTERS[dtype])
    values = struct.unpack("=%d%s" % (count, LETTERS[dtype]), data)
    if wanted == "bool":
        values = [value != 0 for value in values]
    elif wanted == "float16":
        # struct refuses what a half float cannot hold; it rounds to infinity from here on.
        values = [value if not abs(value) >= 65520.0 else math.copysign(math.inf, value) for value in values]
    elif LETTERS[wanted] in "fd":
        values = [float(value) for value in values]
    else:
        values = [int(value) for value in values]
    return struct.pack("=%d%s" % (count, LETTERS[wanted]), *values)


def plain(shape):
    """Return TensorRT's Dims as a list."""
    return [int(axis) for axis in shape]


def shown(least, most):
    """Return the shapes between two for a person."""
    return "[%s]" % ", ".join(str(low) if low == high else "%d to %d" % (low, high) for low, high in zip(least, most))


class Words:
    """What TensorRT said last of what went wrong; everything above information goes to stderr as well."""

    def __init__(self, trt):
        self.lines = collections.deque(maxlen=LOG_LINES)
        self.logger = self._logger(trt, self.lines)

    @staticmethod
    def _logger(trt, lines):
        bad = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
        shown_too = (trt.ILogger.WARNING,)

        class Logger(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, severity, text):
                if severity in bad:
                    lines.append(" ".join(text.split()))
                if severity in bad or severity in shown_too:
                    print(text, file=sys.stderr, flush=True)

        return Logger()

    def failure(self, sentence):
        """Return the exception for something that TensorRT did not do, with what it said."""
        said = "; ".join(self.lines)
        self.lines.clear()
        words = "%s (TensorRT says: %s)" % (sentence, said or "nothing")
        if any(word in said.lower() for word in FULL):
            return MemoryError("%s; close what else uses the GPU, or bind a smaller batch" % words)
        return RuntimeError(words)


def layer_times(trt, times):
    """Return a profiler of TensorRT's that notes (layer, milliseconds) in `times`."""

    class LayerTimes(trt.IProfiler):
        def __init__(self):
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name, ms):
            times.append((layer_name, ms))

    return LayerTimes()


def output_allocator(trt, buffers, tensor, failed):
    """Return an allocator of TensorRT's for an output whose size only the inference itself tells."""

    class Allocator(trt.IOutputAllocator):
        def __init__(self):
            trt.IOutputAllocator.__init__(self)

        def reallocate_output(self, _name, _memory, size, _alignment):
            # What is raised here would end the process in some versions.
            try:
                size = max(1, size)
                if size > tensor.device_room:
                    release(buffers, tensor, "device")
                    tensor.device = buffers.allocate(size)
                    tensor.device_room = size
            except Exception as error:  # noqa: BLE001 - told after the inference, which fails by our None
                failed.append(error)
                return None
            return tensor.device

        def reallocate_output_async(self, name, memory, size, alignment, _stream):
            return self.reallocate_output(name, memory, size, alignment)

        def notify_shape(self, _name, shape):
            tensor.now = plain(shape)
            tensor.size = tensor.bytes_of(tensor.now)

    return Allocator()


def release(buffers, tensor, side):
    """Free a tensor's memory on one side."""
    address = getattr(tensor, side)
    setattr(tensor, side, None)
    setattr(tensor, side + "_room", 0)
    if address is not None:
        (buffers.free if side == "device" else buffers.free_host)(address)


DRIVER = Driver()
CUDA, WITHOUT_CUDA = find_cuda_runtime(DRIVER)
if CUDA is None and importlib.util.find_spec("pycuda") is None:
    raise absent(WITHOUT_CUDA)
TENSORRT = import_any()


class Session:
    """One loaded engine with one execution context.

    Options:
        module: "tensorrt" or "tensorrt_rtx"; default: what is installed here.
        fingerprint: {"tensorrt", "compute_capability"} of where the engine was built; others are refused.
        version_compatible: default False; the engine may have been built by an earlier version.
        buffers: "cudart" (default) or "pycuda".
        cuda_graph: default False; start one captured graph instead of kernel by kernel.
        spin_wait: default False; wait for the GPU in a busy loop.
        copies: default True; an inference includes the copies of its inputs and outputs. Without them, bind and
            outputs copy.
        event_times: default 0; how many of the last inferences to time by CUDA events too, for event_times_ms.
        dla_core: default -1, none.
        threads: 1; one thread feeds the GPU.
        ports: what the model calls its tensors and what types they have there, by the model's names.
    """

    runtime = "%s %s" % (TENSORRT.__name__, TENSORRT.__version__)

    def __init__(self, artifact, options):
        self._closing = contextlib.ExitStack()
        try:
            self._open(artifact, options)
        except BaseException:
            self._closing.close()
            raise

    def _open(self, artifact, options):
        if int(options.get("threads", 1)) != 1:
            raise ValueError("threads is %s, and one thread feeds the GPU; leave it out" % options["threads"])
        name = options.get("module", TENSORRT.__name__)
        if name not in MODULES:
            raise ValueError("module is %r; give %s" % (name, " or ".join(MODULES)))
        self._trt = TENSORRT if name == TENSORRT.__name__ else import_module(name)
        self.runtime = "%s %s" % (name, self._trt.__version__)
        self._has_own_graphs = hasattr(self._trt, "CudaGraphStrategy")
        self._copies = bool(options.get("copies", True))
        self._is_spinning = bool(options.get("spin_wait", False))
        self._wants_graph = bool(options.get("cuda_graph", False))
        self._graph = self._context = None
        self._is_bound = self._has_answers = False
        self._failed = []
        self._words = Words(self._trt)
        self._demand_here(options)
        self._buffers = self._make_buffers(options.get("buffers", "cudart"))
        self._closing.callback(self._buffers.close)
        self._stream = self._buffers.stream
        self._free_before = self._least_free = self._buffers.memory()[0]
        self._engine = self._load(artifact, options)
        self._closing.callback(self._drop)
        self._inputs, self._outputs = self._tensors(options.get("ports", {}))
        self._closing.callback(self._release)
        self._context = self._make_context(self._wants_graph)
        self._look_at_memory()
        self._profile, self._shapes = 0, None
        self._event_pairs = self._make_events(int(options.get("event_times", 0)))

    # ------------------------------------------------------------------------------------------------- loading

    def _demand_here(self, options):
        """Refuse an engine that was built elsewhere: TensorRT ties it to its version and to the GPU."""
        built = options.get("fingerprint")
        if not built:
            return
        capability = DRIVER.compute_capability()
        version = str(self._trt.__version__)
        fits = built["tensorrt"] == version or bool(options.get("version_compatible", False))
        if not fits or built["compute_capability"] != capability:
            raise ValueError(
                "the engine was built by TensorRT %s for compute capability %s, and here is TensorRT %s on compute "
                "capability %s; build it on this device"
                % (built["tensorrt"], built["compute_capability"], version, capability)
            )

    def _make_buffers(self, kind):
        if kind == "pycuda" and self._wants_graph and not self._has_own_graphs:
            raise ValueError("pycuda cannot capture CUDA graphs; leave buffers=pycuda or cuda_graph out")
        if kind == "pycuda":
            return PycudaBuffers(DRIVER, self._is_spinning)
        if kind != "cudart":
            raise ValueError("buffers is %r; give cudart or pycuda" % (kind,))
        if CUDA is None:
            raise RuntimeError("%s; or give -O buffers=pycuda, which is installed" % WITHOUT_CUDA)
        return CudartBuffers(CUDA, self._is_spinning)

    def _load(self, artifact, options):
        """Return the engine in a file."""
        trt = self._trt
        if hasattr(trt, "init_libnvinfer_plugins"):
            # TensorRT 8 computes some ONNX operators by plugins, which an engine finds only once they are registered.
            trt.init_libnvinfer_plugins(self._words.logger, "")
        self._loader = trt.Runtime(self._words.logger)
        if int(options.get("dla_core", -1)) >= 0:
            self._loader.DLA_core = int(options["dla_core"])
        if options.get("version_compatible", False) and hasattr(self._loader, "engine_host_code_allowed"):
            self._loader.engine_host_code_allowed = True
        with open(artifact, "rb") as stream:
            engine = self._loader.deserialize_cuda_engine(stream.read())
        if engine is None:
            raise self._words.failure(
                "TensorRT %s on compute capability %s does not load the engine: it is truncated, or was built by "
                "another version or for another GPU; build it on this device"
                % (trt.__version__, DRIVER.compute_capability())
            )
        return engine

    def _tensors(self, ports):
        """Return the inputs and the outputs, by the model's names."""
        trt, engine = self._trt, self._engine
        names = {place.get("tensor", name): name for name, place in ports.items()}
        found = ([], [])
        for index in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(tensor).name
            if kind not in TYPES:
                raise ValueError("%r has TensorRT's type %s, which a session cannot hand over" % (tensor, kind))
            name = names.get(tensor, tensor)
            made = Tensor(
                name, tensor, TYPES[kind], ports.get(name, {}).get("dtype", TYPES[kind]),
                plain(engine.get_tensor_shape(tensor)), engine.get_tensor_location(tensor) == trt.TensorLocation.HOST,
            )  # fmt: skip
            if made.model_dtype not in LETTERS:
                raise ValueError("%r is %s in the model, which a session cannot hand over" % (name, made.model_dtype))
            found[engine.get_tensor_mode(tensor) != trt.TensorIOMode.INPUT].append(made)
        inputs, outputs = ({one.name: one for one in side} for side in found)
        lost = [name for name, place in ports.items() if name not in inputs and name not in outputs]
        if lost:
            raise ValueError(
                "the engine has no tensor %r (it has %s); build it again"
                % (ports[lost[0]].get("tensor", lost[0]), ", ".join(sorted([*inputs, *outputs])))
            )
        return inputs, outputs

    def _make_context(self, wants_graph):
        """Return a new execution context."""
        trt, engine = self._trt, self._engine
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT-RTX compiles kernels for a shape when it first meets it, by itself in the background, while
            # slower ones compute: inferences would become faster while they are timed.
            config = engine.create_runtime_config()
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            if wants_graph and self._has_own_graphs:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            free, total = self._buffers.memory()
            raise self._words.failure(
                "TensorRT could not make room to run the engine, which needs %d bytes of the GPU's memory (%d of its "
                "%d are free)" % (self._engine_bytes(), free, total)
            )
        return context

    def _make_events(self, count):
        """Return as many pairs of events, used in turn; none of an inference's time goes into making them."""
        if count < 0:
            raise ValueError("event_times is %d; give 0 or more" % count)
        pairs = []
        for _ in range(count):
            pairs.append((self._buffers.event(), self._buffers.event()))
            self._closing.callback(self._buffers.free_event, pairs[-1][0])
            self._closing.callback(self._buffers.free_event, pairs[-1][1])
        self._next_pair = itertools.cycle(range(count)) if count else None
        self._timed = collections.deque(maxlen=count)
        return pairs

    # ------------------------------------------------------------------------------------------------- closing

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._closing.close()

    def _drop(self):
        """Let TensorRT's objects go, in this order: each refers to the next."""
        self._context = None
        self._engine = None
        self._loader = None

    def _release(self):
        """Free all memory of tensors, and the graph that writes to it."""
        self._is_bound = self._has_answers = False
        self._forget_graph()
        # An allocator must not outlive its tensor's memory, nor be freed while the context knows it.
        self._context = None
        for tensor in (*self._inputs.values(), *self._outputs.values()):
            for side in ("host", "device"):
                release(self._buffers, tensor, side)

    def _forget_graph(self):
        graph, self._graph = self._graph, None
        if graph is not None:
            self._buffers.free_graph(graph)

    # ------------------------------------------------------------------------------------------------- what it is

    def boundary(self):
        where = "inside" if self._copies else "outside"
        graph = "no CUDA graph"
        if self._wants_graph:
            graph = "CUDA graphs by the runtime" if self._has_own_graphs else "a CUDA graph of the kernels"
        waiting = "busy waiting" if self._is_spinning else "waiting asleep"
        return {
            "includes_input_copy": self._copies,
            "includes_output_copy": self._copies,
            "threads": 1,
            "detail": "execute_async_v3 on one stream, pinned copies %s, %s, %s, buffers by %s, optimization profile "
            "%d, the engine needs %.1f MiB of GPU memory"
            % (where, graph, waiting, self._buffers.name, self._profile, self._engine_bytes() / 2**20),
        }

    def _engine_bytes(self):
        """Return the memory that the engine says a context needs for activations, without its weights."""
        new = hasattr(self._engine, "device_memory_size_v2")
        return int(self._engine.device_memory_size_v2 if new else self._engine.device_memory_size)

    def _look_at_memory(self):
        self._least_free = min(self._least_free, self._buffers.memory()[0])

    def memory(self):
        """Return what the GPU's memory went through, in bytes.

        device_bytes: how much less was free at the worst moment that we looked, than before the engine was loaded. It
            counts what other programs took meanwhile, and on a Jetson, which has one memory, what the system took.
        engine_bytes: what the engine itself says a context needs for activations.
        """
        self._look_at_memory()
        free, total = self._buffers.memory()
        return {
            "device_bytes": self._free_before - self._least_free,
            "engine_bytes": self._engine_bytes(),
            "free_bytes": free,
            "total_bytes": total,
        }

    # ------------------------------------------------------------------------------------------------- inputs

    def bind(self, inputs):
        if set(inputs) != set(self._inputs):
            raise ValueError("the model takes the inputs %s, not %s" % (sorted(self._inputs), sorted(inputs)))
        shapes = {name: [int(axis) for axis in inputs[name][2]] for name in inputs}
        profile = self._profile_for(shapes)
        data = {name: tensor.converted(*inputs[name]) for name, tensor in self._inputs.items()}
        sized_by_values = any(tensor.is_on_host for tensor in self._inputs.values())
        self._is_bound, self._has_answers = False, False
        for name, tensor in self._inputs.items():
            self._make_room(tensor, shapes[name])
            memoryview((ctypes.c_ubyte * tensor.size).from_address(tensor.host)).cast("B")[: len(data[name])] = data[
                name
            ]
        if shapes != self._shapes or sized_by_values:
            self._shapes = None
            self._forget_graph()
            self._take_shapes(shapes, profile)
            self._shapes = shapes
        if not self._copies:
            self._upload()
            self._buffers.wait()
        self._look_at_memory()
        self._is_bound = True

    def _profile_for(self, shapes):
        """Return the number of the first optimization profile that has room for these shapes.

        Raises:
            ValueError: naming the input and the shapes that it can have.
        """
        for name, tensor in self._inputs.items():
            fits = len(tensor.shape) == len(shapes[name]) and 0 not in shapes[name]
            if not fits or any(want not in (-1, got) for want, got in zip(tensor.shape, shapes[name])):
                raise ValueError(self._misfit(name, shapes[name]))
        first = None
        for number in range(self._engine.num_optimization_profiles):
            misfit = self._beyond(number, shapes)
            if misfit is None:
                return number
            first = first or misfit
        raise ValueError(self._misfit(first, shapes[first]))

    def _ranges(self, tensor):
        """Return [(least, most)] shapes that an input can have, one for each optimization profile."""
        if -1 not in tensor.shape:
            return [(tensor.shape, tensor.shape)]
        found = []
        for number in range(self._engine.num_optimization_profiles):
            least, _, most = self._engine.get_tensor_profile_shape(tensor.tensor, number)
            found.append((plain(least), plain(most)))
        return found

    def _beyond(self, profile, shapes):
        """Return the first input whose shape is out of a profile's range, or None."""
        for name, tensor in self._inputs.items():
            if -1 in tensor.shape:
                least, most = self._ranges(tensor)[profile]
                if not all(low <= axis <= high for low, axis, high in zip(least, shapes[name], most)):
                    return name
        return None

    def _misfit(self, name, shape):
        known = " or ".join(dict.fromkeys(shown(*both) for both in self._ranges(self._inputs[name])))
        is_open = -1 in self._inputs[name].shape
        then = "; the range was decided when the engine was built (-O axes=...)" if is_open else ""
        return "input %r takes the shape %s, not %s%s" % (name, known, shape, then)

    def _make_room(self, tensor, shape):
        """Have memory for a shape on both sides."""
        tensor.now, tensor.size = shape, tensor.bytes_of(shape)
        sides = ("host",) if tensor.is_on_host else ("host", "device")
        for side in sides:
            if tensor.size > getattr(tensor, side + "_room"):
                self._shapes = None  # addresses change, and with them the graph
                self._forget_graph()
                release(self._buffers, tensor, side)
                allocate = self._buffers.allocate if side == "device" else self._buffers.allocate_host
                setattr(tensor, side, allocate(tensor.size))
                setattr(tensor, side + "_room", tensor.size)

    def _take_shapes(self, shapes, profile):
        """Tell the context shapes and addresses, and make room for what it answers.

        Raises:
            ValueError: the engine cannot compute with these.
        """
        context = self._context
        if profile != self._profile:
            self._demand(context.set_optimization_profile_async(profile, self._stream), "take profile %d" % profile)
            self._buffers.wait()
            self._profile = profile
        for name, tensor in self._inputs.items():
            if not context.set_input_shape(tensor.tensor, tuple(shapes[name])):
                refused = self._words.failure("the engine does not take the shape %s for %r" % (shapes[name], name))
                raise ValueError(str(refused))
            self._set_address(context, tensor)
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            said = self._words.failure("the engine cannot take inputs of these shapes, %s: %s" % (shapes, error))
            raise ValueError(str(said)) from error
        if missing:
            raise ValueError("the engine also needs to know %s" % ", ".join(missing))
        for tensor in self._outputs.values():
            shape = plain(context.get_tensor_shape(tensor.tensor))
            if -1 in shape:
                self._leave_open(context, tensor)
            else:
                self._make_room(tensor, shape)
                self._set_address(context, tensor)

    def _set_address(self, context, tensor):
        address = tensor.host if tensor.is_on_host else tensor.device
        self._demand(context.set_tensor_address(tensor.tensor, address), "take the address of %r" % tensor.name)

    def _leave_open(self, context, tensor):
        """Let an inference decide how large an output is."""
        if self._wants_graph and not self._has_own_graphs:
            raise ValueError(
                "the size of the output %r depends on the data, which a CUDA graph cannot follow; leave cuda_graph out"
                % tensor.name
            )
        if tensor.allocator is None:
            tensor.allocator = output_allocator(self._trt, self._buffers, tensor, self._failed)
        tensor.now = None
        done = context.set_output_allocator(tensor.tensor, tensor.allocator)
        self._demand(done, "take an allocator for the output %r" % tensor.name)

    def _demand(self, done, what):
        if not done:
            raise self._words.failure("TensorRT did not %s" % what)

    # ------------------------------------------------------------------------------------------------- inference

    def _upload(self):
        for tensor in self._inputs.values():
            if not tensor.is_on_host:
                self._buffers.upload(tensor.device, tensor.host, tensor.size)

    def _download(self):
        """Start the copies of outputs whose sizes are known; return the others."""
        late = []
        for tensor in self._outputs.values():
            if tensor.allocator is not None:
                late.append(tensor)
            elif not tensor.is_on_host:
                self._buffers.download(tensor.host, tensor.device, tensor.size)
        return late

    def _download_late(self, late):
        """Copy outputs whose sizes the inference has decided."""
        for tensor in late:
            if tensor.now is None:
                raise self._words.failure("TensorRT did not say how large the output %r is" % tensor.name)
            if tensor.size > tensor.host_room:
                release(self._buffers, tensor, "host")
                tensor.host = self._buffers.allocate_host(tensor.size)
                tensor.host_room = tensor.size
            self._buffers.download(tensor.host, tensor.device, tensor.size)
        self._buffers.wait()

    def _execute(self, context):
        if not context.execute_async_v3(self._stream):
            if self._failed:
                raise self._failed.pop()
            raise self._words.failure("TensorRT could not compute the model")

    def _captured(self):
        """Return a graph of the kernels; the copies stay outside of it, as in trtexec, whose figures it shall match."""
        # In its first run a kernel may set itself up, which no capture can hold.
        self._upload()
        self._execute(self._context)
        self._buffers.wait()
        try:
            return self._buffers.capture(lambda: self._execute(self._context))
        except RuntimeError as error:
            raise RuntimeError(
                "this engine cannot be captured as a CUDA graph (%s); leave cuda_graph out: loops, branches and sizes "
                "that depend on data never can be" % error
            ) from error

    def infer(self):
        if not self._is_bound:
            raise RuntimeError("there are no inputs yet; bind them first")
        self._has_answers = False
        if self._wants_graph and self._graph is None and not self._has_own_graphs:
            self._graph = self._captured()
        buffers = self._buffers
        if self._copies:
            self._upload()
        pair = None
        if self._event_pairs:
            pair = self._event_pairs[next(self._next_pair)]
            buffers.record(pair[0])
        if self._graph is not None:
            buffers.launch(self._graph)
        else:
            self._execute(self._context)
        if pair:
            buffers.record(pair[1])
            self._timed.append(pair)
        late = self._download() if self._copies else ()
        buffers.wait()
        if late:
            self._download_late(late)
        self._has_answers = True

    def event_times_ms(self):
        """Return the milliseconds of GPU time of the last inferences, oldest first, without the copies.

        It is the time between two CUDA events around the kernels: what the GPU took, and not what waking the host did.
        """
        return [self._buffers.elapsed_ms(*pair) for pair in self._timed]

    def outputs(self):
        if not self._has_answers:
            raise RuntimeError("there are no answers yet; infer first")
        if not self._copies:
            late = self._download()
            self._buffers.wait()
            self._download_late(late)
        answers = {}
        for name, tensor in self._outputs.items():
            size = count_of(tensor.now) * struct.calcsize(LETTERS[tensor.dtype])
            data = ctypes.string_at(tensor.host, size)
            answers[name] = (bytes(recoded(data, tensor.dtype, tensor.model_dtype)), tensor.model_dtype, tensor.now)
        self._look_at_memory()
        return answers

    def profile(self, runs=10):
        """Return [(layer's name, "", seconds)] in order, each the median of `runs` inferences.

        TensorRT times every layer of these, in a context of their own. Their sum is more than an inference takes, and
        nothing of it is inside what infer takes. The answers are forgotten: these inferences overwrite them.

        Raises:
            RuntimeError: nothing is bound, or TensorRT could not compute.
        """
        if not self._is_bound:
            raise RuntimeError("there are no inputs yet; bind them first")
        shapes, profile = self._shapes, self._profile
        times, passes = [], []
        try:
            self._start_over(shapes, profile, wants_graph=False)
            self._context.profiler = layer_times(self._trt, times)
            self._upload()
            for _ in range(runs):
                self._execute(self._context)
                self._buffers.wait()
                passes.append(list(times))
                del times[:]
        finally:
            self._start_over(shapes, profile, wants_graph=self._wants_graph)
        self._is_bound = True
        return [(same[0][0], "", statistics.median(ms for _, ms in same) / 1e3) for same in zip(*passes)]

    def _start_over(self, shapes, profile, wants_graph):
        """Replace the context by a new one for the same shapes: TensorRT 8 allows one at a time for each profile."""
        self._is_bound = self._has_answers = False
        self._shapes = None
        self._forget_graph()
        self._context = None
        self._context = self._make_context(wants_graph)
        self._profile = 0
        self._take_shapes(shapes, profile)
        self._shapes = shapes
