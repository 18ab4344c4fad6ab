"""The builder: runs on the device, where a kit becomes an engine; standard library and TensorRT.

One source for TensorRT 8.5 to 11: what to do is decided by what the installed module really has, never by its version,
and enumerations are never written as numbers, because those move between versions.

TensorRT's own log goes to stderr, line by line and flushed: when the process is killed, these lines are what is left.
"""

import collections
import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import json
import mmap
import os
import platform
import re
import shutil
import sys
import threading
import time
import zipfile

KIT = "edgedeploy.kit/1"
MEMBERS = ("kit.json", "weak.onnx", "typed.onnx")
# kit.json is some names and numbers; more than this is not one.
KIT_JSON_BYTES = 64 << 20

DEFAULTS = {
    "workspace_mib": 0, "time_limit_s": 3600, "optimization_level": -1, "builds": 1, "pin_tactics": True,
    "refit": False, "dla_core": -1, "version_compatible": False,
}  # fmt: skip

TELL_S = 1.0
LOG_LINES = 40
# TensorRT asks whether to go on only between two steps; one step may be the timing of a slow layer.
STEP_GRACE_S = 120.0
# Of the memory that is free: a graphics card's is TensorRT's alone; a Jetson's is also what the build itself lives in.
DISCRETE_SHARE, INTEGRATED_SHARE = 0.9, 0.5

# Numbers of CUdevice_attribute in cuda.h; they are part of the driver's ABI.
INTEGRATED, MAJOR, MINOR = 18, 75, 76

# Lines of the verbose log that say which node or layer is at work: the last of them names what killed the process.
LANDMARKS = ("Parsing node: ", "=============== Computing costs for ")
PARSING = re.compile(r"Parsing node: (?P<name>.*?) \[(?P<op>\w+)\]")
BUILDING = re.compile(r"Computing costs for (?P<name>.+?)\s*$")
NO_KERNEL = re.compile(r"Could not find any implementation for node (?P<name>.+?)(?: due to [^.]*)?\.(?:\)| |$)")

OUT_OF_MEMORY = ("out of memory", "outofmemory", "out_of_memory", "memoryallocation", "insufficient memory")
NO_WORKSPACE = ("insufficient workspace", "insuficient memory on requested size")

# What the parser's refusals mean for a person: part of TensorRT's text -> what to do.
REMEDIES = (
    ("zero zero point", "quantize again for this target: TensorRT takes symmetric int8 only"),
    ("shiftIsAllZeros", "quantize again for this target: TensorRT takes symmetric int8 only"),
    ("UINT8", "quantize again for this target: TensorRT takes signed int8, not uint8"),
    ("type Int32 but must have type", "quantize again for this target: its biases must stay float"),
    ("must have same input types", "compile with -O float_type=float32 and report this: its floats are mixed"),
    ("No importer registered", "replace the operator in the model, or compile for another back end"),
    ("Plugin not found", "replace the operator in the model, or compile for another back end"),
    ("opset", "export the model with opset 17 or lower"),
)  # fmt: skip
REMEDY = "replace the operator in the model, or compile for another back end"

# TensorRT's name of a type -> ours.
DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool",
}  # fmt: skip
# Number of an ONNX TensorProto.DataType -> numpy's name, for weights that can be put into an engine.
WEIGHT_DTYPES = {1: "float32", 10: "float16", 3: "int8", 6: "int32"}


class BuildError(Exception):
    """No engine; the text is a sentence, `kind` a word for programs."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


# ---------------------------------------------------------------------------------------------------- what is here


class NoDriver(Exception):
    """There is no GPU that this process can use; the text says why."""


class Driver:
    """NVIDIA's driver library, through the few calls that say what the GPU is.

    It is asked before any object of TensorRT is made: without a driver some versions of those end the process.

    Raises:
        NoDriver: no driver, or no GPU.
    """

    def __init__(self):
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NoDriver(
                "there is no NVIDIA driver here (%s); install it, or in a container run it with --gpus all" % error
            ) from error
        self.call("cuInit", 0)
        self.devices = self.integer("cuDeviceGetCount")
        if self.devices < 1:
            raise NoDriver("the NVIDIA driver works and finds no GPU; is one hidden by CUDA_VISIBLE_DEVICES?")

    def call(self, name, *arguments):
        """Call a function that returns a CUresult.

        Raises:
            NoDriver: the driver refused, or does not have the function.
        """
        try:
            code = getattr(self.library, name)(*arguments)
        except AttributeError as error:
            raise NoDriver("the NVIDIA driver has no %s; it is too old" % name) from error
        if code != 0:
            raise NoDriver(
                "the NVIDIA driver's %s returned error %d; does nvidia-smi or tegrastats work there?" % (name, code)
            )

    def integer(self, name, *arguments):
        """Return the integer that a function writes."""
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def cuda(self):
        """Return the newest CUDA that the driver knows: "12.6"."""
        version = self.integer("cuDriverGetVersion")  # 1000 * major + 10 * minor
        return "%d.%d" % (version // 1000, version % 1000 // 10)

    def describe(self, number):
        """Return name, compute capability and memory of one GPU."""
        device = self.integer("cuDeviceGet", number)
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        capability = tuple(self.integer("cuDeviceGetAttribute", which, device) for which in (MAJOR, MINOR))
        return {
            "name": name.value.decode("utf-8", "replace"),
            "compute_capability": "%d.%d" % capability,
            "memory_bytes": memory.value,
            "is_integrated": bool(self.integer("cuDeviceGetAttribute", INTEGRATED, device)),
        }

    def free_bytes(self):
        """Return the memory of the first GPU that is free now."""
        device = self.integer("cuDeviceGet", 0)
        context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self.call("cuCtxSetCurrent", context)
            self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        finally:
            self.call("cuDevicePrimaryCtxRelease_v2", device)
        return free.value


def read_text(sysroot, path):
    """Return a file's text, or "" where it is not there."""
    try:
        with open(os.path.join(sysroot, path), encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def read_jetpack(sysroot="/"):
    """Return (JetPack, L4T) of a Jetson, each "" where it is not said; pure but for the files below `sysroot`.

    L4T stands in /etc/nv_tegra_release: "# R36 (release), REVISION: 4.3, ...". JetPack itself is a package, and only
    there when it was installed as one.
    """
    found = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", read_text(sysroot, "etc/nv_tegra_release"))
    for stanza in read_text(sysroot, "var/lib/dpkg/status").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[:1].strip())
        if fields.get("Package") == "nvidia-jetpack" and fields.get("Status", "").endswith(" installed"):
            return fields.get("Version", ""), ".".join(found.groups()) if found else ""
    return "", ".".join(found.groups()) if found else ""


def read_driver_version(sysroot="/"):
    """Return the version of the kernel's half of the driver, "560.35.03", or "" where it is not said."""
    found = re.search(r"Module(?: for \S+)?\s+([\d.]+)", read_text(sysroot, "proc/driver/nvidia/version"))
    return found.group(1) if found else ""


def read_memory_kib(path, key):
    """Return "key: n kB" of a file of /proc, or 0."""
    found = re.search(r"^%s:\s+(\d+) kB" % key, read_text("/", path), re.MULTILINE)
    return int(found.group(1)) if found else 0


def installed_tensorrt(may_import):
    """Return (version, why not): of the module that this Python would import, without making any object of it."""
    python = "%s (Python %s)" % (sys.executable, platform.python_version())
    try:
        if importlib.util.find_spec("tensorrt") is None:
            return "", "%s has no module tensorrt; on a Jetson it is the package python3-libnvinfer" % python
        if may_import:
            return str(importlib.import_module("tensorrt").__version__), ""
    except Exception as error:  # noqa: BLE001 - missing libraries, another processor
        return "", "%s cannot import tensorrt: %s: %s" % (python, type(error).__name__, " ".join(str(error).split()))
    from importlib import metadata

    for name in ("tensorrt", "tensorrt-bindings", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name), ""
    return "", "%s has a module tensorrt, whose version cannot be read without a driver" % python


def probe():
    """Return what of TensorRT is here. No object of TensorRT is made: without a driver that may end the process.

    Returns:
        "driver": "" or why there is none; "driver_version"; "cuda_driver": "12.6"; "devices": [{"name",
        "compute_capability", "memory_bytes", "is_integrated"}]; "tensorrt": "10.3.0" or ""; "tensorrt_problem": "" or
        why not; "python"; "jetpack": "6.2+b77", where that is not said "L4T 36.4.3", or ""; "l4t".
    """
    found = {"driver": "", "cuda_driver": "", "devices": []}
    try:
        driver = Driver()
        found["cuda_driver"] = driver.cuda()
        found["devices"] = [driver.describe(number) for number in range(driver.devices)]
    except NoDriver as error:
        found["driver"] = str(error)
    found["tensorrt"], found["tensorrt_problem"] = installed_tensorrt(may_import=not found["driver"])
    jetpack, found["l4t"] = read_jetpack()
    found["jetpack"] = jetpack or ("L4T " + found["l4t"] if found["l4t"] else "")
    found["driver_version"] = read_driver_version()
    found["python"] = platform.python_version()
    return found


# ---------------------------------------------------------------------------------------------------- the kit


class Kit:
    """What the host made: one model in two forms, and what is to be made of it.

    No member is written where its name says; each is read by the name that we know.

    Raises:
        BuildError: not a whole kit, or of another format.
    """

    def __init__(self, path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.check(archive)
                told = json.loads(archive.read("kit.json").decode("utf-8"))
                if not isinstance(told, dict) or told.get("format") != KIT:
                    raise BuildError(
                        "bad-kit",
                        "the kit says the format %r and this builder reads %r; compile it again with the edgedeploy "
                        "that builds it" % (told.get("format") if isinstance(told, dict) else told, KIT),
                    )
                self.precision, self.float_type = str(told["precision"]), str(told["float_type"])
                self.has_int8 = told["has_int8"] is True
                self.float32_nodes = {str(node): str(why) for node, why in told["float32_nodes"].items()}
                self.profiles = {
                    str(name): {key: [int(axis) for axis in ranges[key]] for key in ("min", "opt", "max")}
                    for name, ranges in told["profiles"].items()
                }
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BuildError(
                "bad-kit", "the kit is not whole (%s: %s); compile it again" % (type(error).__name__, error)
            ) from error

    def check(self, archive):
        """Raise where the archive holds anything but the three members, each as it is and once."""
        members = archive.infolist()
        if sorted(member.filename for member in members) != sorted(MEMBERS):
            raise BuildError(
                "bad-kit",
                "the kit holds %s and not just %s; it was not made by edgedeploy"
                % (", ".join(repr(member.filename) for member in members) or "nothing", ", ".join(MEMBERS)),
            )
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise BuildError(
                    "bad-kit", "the kit's %s is compressed; it was not made by edgedeploy" % member.filename
                )
        if archive.getinfo("kit.json").file_size > KIT_JSON_BYTES:
            raise BuildError("bad-kit", "the kit's kit.json is too large to be one; it was not made by edgedeploy")

    def asks(self):
        """Return what is asked of an engine beside its graph."""
        return self.precision, self.float_type, sorted(self.float32_nodes), self.profiles

    def extract(self, form, path):
        """Write one form to a file; its checksum is verified on the way."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(form) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (zipfile.BadZipFile, EOFError, KeyError) as error:
            raise BuildError("bad-kit", "the kit's %s is not whole (%s); compile it again" % (form, error)) from error
        return path


# ---------------------------------------------------------------------------------------------------- ONNX, as bytes


def read_varint(data, at):
    """Return a protocol buffer's variable-length integer and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number runs over 64 bits")


def fields_of(data):
    """Yield (number, value) of each field of a protocol buffer: an integer, or a view of its bytes.

    Raises:
        ValueError: it is damaged.
    """
    if isinstance(data, int):
        raise ValueError("a number stands where a message belongs")
    at, end = 0, len(data)
    while at < end:
        try:
            key, at = read_varint(data, at)
            wire = key & 7
            if wire == 0:
                value, at = read_varint(data, at)
            else:
                size, at = read_varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
                value, at = data[at : at + size], at + size
        except (IndexError, KeyError) as error:
            raise ValueError("it is not a protocol buffer") from error
        if at > end:
            raise ValueError("a field runs over its end")
        yield key >> 3, value


def text_of(message, number):
    """Return a string field, or ""."""
    values = (value for key, value in fields_of(message) if key == number and not isinstance(value, int))
    return bytes(next(values, b"")).decode("utf-8", "replace")


def onnx_parts(data, number):
    """Yield the parts of a model's graph of one kind: 1 nodes, 5 initializers (onnx.proto, GraphProto)."""
    for key, graph in fields_of(data):
        if key == 7:  # ModelProto.graph
            for part, value in fields_of(graph):
                if part == number:
                    yield value


def view_of(path):
    """Return a file's bytes without reading them all; the mapping lives as long as anything that was taken from it."""
    with open(path, "rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def node_at(path, index):
    """Return (name, operator) of a node of an ONNX file, or ("", "") where there is no such node."""
    for number, node in enumerate(onnx_parts(view_of(path), 1)):
        if number == index:
            return text_of(node, 3) or text_of(node, 2), text_of(node, 4)
    return "", ""


def weights_of(path):
    """Return {initializer: (number of its type, dims, digest of its bytes)} and a digest of all that is no weight."""
    weights, rest = {}, hashlib.sha256()
    for key, value in fields_of(view_of(path)):
        if key != 7:
            rest.update(field_bytes(key, value))
            continue
        for part, piece in fields_of(value):
            if part == 5:
                name, described, digest = describe_tensor(piece)
                weights[name] = (*described, digest)
                rest.update(repr((name, described)).encode("utf-8"))
            else:
                rest.update(field_bytes(part, piece))
    return weights, rest.hexdigest()


def field_bytes(number, value):
    """Return what a digest takes of a field: its number, its size and its bytes, so that no two fields look alike."""
    data = b"%d" % value if isinstance(value, int) else bytes(value)
    return b"%d:%d:" % (number, len(data)) + data


def describe_tensor(tensor):
    """Return (name, (type, dims), digest of its values) of a TensorProto."""
    name, dtype, dims, values = "", 0, [], hashlib.sha256()
    for key, value in fields_of(tensor):
        if key == 8 and not isinstance(value, int):
            name = bytes(value).decode("utf-8", "replace")
        elif key == 2:
            dtype = value
        elif key == 1:
            dims += [value] if isinstance(value, int) else packed(value)
        elif key != 12:  # the doc string is no value
            values.update(field_bytes(key, value))
    return name, (dtype, tuple(dims)), values.hexdigest()


def packed(data):
    """Return the integers of a packed field."""
    values, at = [], 0
    while at < len(data):
        value, at = read_varint(data, at)
        values.append(value)
    return values


def raw_weights(path, wanted):
    """Yield (name, numpy's type, bytes) of the initializers that are wanted and stored as plain bytes."""
    for tensor in onnx_parts(view_of(path), 5):
        name = text_of(tensor, 8)
        dtype = next((value for key, value in fields_of(tensor) if key == 2), 0)
        raw = next((bytes(value) for key, value in fields_of(tensor) if key == 9), None)
        if name in wanted and raw is not None and dtype in WEIGHT_DTYPES:
            yield name, WEIGHT_DTYPES[dtype], raw


# ---------------------------------------------------------------------------------------------------- log and progress


class Log:
    """The end of TensorRT's log and every error in it; warnings and landmarks go to stderr as they come."""

    def __init__(self):
        self.lock = threading.Lock()
        self.lines = collections.deque(maxlen=LOG_LINES)
        self.errors = []
        self.node = ("", "")

    def take(self, level, text):
        """Take one message; TensorRT calls this from any of its threads, and a hundred thousand times a build."""
        line = "[%s] %s" % (level, text)
        landmark = level == "V" and text.startswith(LANDMARKS)
        is_printed = landmark or level in "FEW"
        with self.lock:
            self.lines.append((line, is_printed))
            if level in "EF":
                self.errors.append(text)
            if landmark:
                found = PARSING.search(text) or BUILDING.search(text)
                if found:
                    self.node = (found.group("name"), found.groupdict().get("op") or "")
        if is_printed:
            print(line, file=sys.stderr, flush=True)

    def last_line(self):
        """Return the newest line that is not of the verbose kind, else the newest."""
        with self.lock:
            for line, _ in reversed(self.lines):
                if not line.startswith("[V]") and any(map(str.isalnum, line[3:])):
                    return line
            return self.lines[-1][0] if self.lines else ""

    def last_node(self):
        """Return "name (operator)" of what was parsed or built last, or ""."""
        with self.lock:
            return "%s (%s)" % self.node if self.node[1] else self.node[0]

    def take_errors(self):
        """Return the errors since the last call."""
        with self.lock:
            errors, self.errors = self.errors, []
        return errors

    def print_tail(self):
        """Print what of the last lines was held back: after a failure they say what went before."""
        with self.lock:
            lines = list(self.lines)
        for line, is_printed in lines[-10:]:
            if not is_printed:
                print(line, file=sys.stderr)
        sys.stderr.flush()


def logger_for(trt, log):
    """Return TensorRT's end of a Log."""
    levels = {
        trt.ILogger.INTERNAL_ERROR: "F", trt.ILogger.ERROR: "E", trt.ILogger.WARNING: "W", trt.ILogger.INFO: "I",
        trt.ILogger.VERBOSE: "V",
    }  # fmt: skip

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, msg):
            log.take(levels.get(severity, "E"), msg)

    return Logger()


class Progress:
    """Says about once a second how far the work is, and ends it when its time is up.

    TensorRT from 10 on names its phases and steps, and asks after each step whether to go on. Before that nobody can
    stop it but the end of the process.
    """

    def __init__(self, tell, log, limit_s):
        self.tell, self.log, self.limit_s = tell, log, limit_s
        self.started_s = time.monotonic()
        self.lock = threading.Lock()
        self.doing = "starting"
        self.phases = []
        self.has_monitor = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.tick, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.ended.set()
        self.thread.join()

    def begin(self, doing):
        """Say what is done now."""
        with self.lock:
            self.doing, self.phases = doing, []
        self.say()

    @property
    def elapsed_s(self):
        return time.monotonic() - self.started_s

    @property
    def is_over(self):
        return self.elapsed_s > self.limit_s

    def phase_start(self, name, parent, steps):
        with self.lock:
            self.phases.append([name, 0, steps])

    def step_complete(self, name, step):
        """Note a finished step; return whether to go on."""
        with self.lock:
            for phase in self.phases:
                if phase[0] == name:
                    phase[1] = step + 1
        return not self.is_over

    def phase_finish(self, name):
        with self.lock:
            self.phases = [phase for phase in self.phases if phase[0] != name]

    def say(self):
        with self.lock:
            names = [name for name, _, _ in self.phases]
            _, done, total = self.phases[-1] if self.phases else ("", None, None)
            words = [": ".join([self.doing, *names[-1:]]), "%d s" % self.elapsed_s]
        words.append("%d MiB of memory used" % (read_memory_kib("proc/self/status", "VmRSS") // 1024))
        last = self.log.last_line()
        if total is None and last:
            words.append(last)
        self.tell(", ".join(words), done, total)

    def tick(self):
        while not self.ended.wait(TELL_S):
            grace_s = STEP_GRACE_S if self.has_monitor else 0.0
            if self.elapsed_s > self.limit_s + grace_s:
                self.give_up()
            try:
                self.say()
            except OSError:  # the agent is gone, and with it whoever was to be told
                return

    def give_up(self):
        """End the process: what runs inside TensorRT's C++ cannot be stopped in any other way."""
        node = self.log.last_node()
        print(
            "The time limit of %g s is over while %s%s, and this TensorRT cannot be asked to stop; the builder ends "
            "itself. Give -O time_limit_s=... more, or -O optimization_level=... less."
            % (self.limit_s, self.doing, " at %s" % node if node else ""),
            file=sys.stderr,
            flush=True,
        )
        os._exit(75)  # EX_TEMPFAIL of sysexits.h


def monitor_for(trt, progress):
    """Return TensorRT's end of a Progress, or None where this version has no such thing."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name, parent_phase, num_steps):
            progress.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name, step):
            return progress.step_complete(phase_name, step)

        def phase_finish(self, phase_name):
            progress.phase_finish(phase_name)

    return Monitor()


# ---------------------------------------------------------------------------------------------------- the network


def chosen_typing(trt, dla_core):
    """Return (whether the network is strongly typed, the flags it is created with).

    Typed wherever it can be: weak typing is deprecated since 10.12 and gone in 11. The exception is DLA, which versions
    with both took weakly typed only.
    """
    kinds = trt.NetworkDefinitionCreationFlag
    flags, names = 0, []
    if hasattr(kinds, "EXPLICIT_BATCH"):  # required up to 9, ignored in 10, gone in 11
        flags |= 1 << int(kinds.EXPLICIT_BATCH)
        names.append("EXPLICIT_BATCH")
    can_be_weak = hasattr(trt.BuilderFlag, "FP16") and hasattr(kinds, "EXPLICIT_BATCH")
    is_typed = not can_be_weak
    if hasattr(kinds, "STRONGLY_TYPED") and not (can_be_weak and dla_core >= 0):
        is_typed = True
        flags |= 1 << int(kinds.STRONGLY_TYPED)
        names.append("STRONGLY_TYPED")
    return is_typed, flags, names


class Build:
    """One visit of the builder: TensorRT's objects, and what is found out on the way."""

    def __init__(self, trt, kit, options, folder, log, progress, facts):
        self.trt, self.kit, self.options, self.folder = trt, kit, options, folder
        self.log, self.progress = log, progress
        self.device = facts["devices"][0]
        self.facts = facts
        self.notes = []
        self.report = {}
        self.dla_core = int(options["dla_core"])
        self.logger = logger_for(trt, log)
        # Plugins are what the parser makes of some standard operators in older versions.
        trt.init_libnvinfer_plugins(self.logger, "")
        self.is_typed, self.network_flags, self.flags = chosen_typing(trt, self.dla_core)
        self.version = str(trt.__version__)

    def note(self, sentence):
        if sentence not in self.notes:
            self.notes.append(sentence)
            print("[note] " + sentence, file=sys.stderr, flush=True)

    def failure(self, kind, message, errors):
        """Return a BuildError with TensorRT's own words; what it ran out of decides its kind."""
        words = " ".join(errors).lower()
        said = "; TensorRT says: " + " | ".join(" ".join(error.split()) for error in errors[:3]) if errors else ""
        self.log.print_tail()
        if any(sign in words for sign in OUT_OF_MEMORY):
            return BuildError(
                "out-of-memory",
                "the device ran out of memory: %s; end other programs there, or give -O workspace_mib=... less%s"
                % (message, said),
            )
        return BuildError(kind, message + said)

    # ---- parsing

    def parse(self, builder, path):
        """Return the network of an ONNX file, and the parser, which owns the network's weights.

        Raises:
            BuildError: naming the node and its operator.
        """
        trt = self.trt
        network = builder.create_network(self.network_flags)
        if network is None:
            raise self.failure("build-failed", "TensorRT %s makes no network" % self.version, self.log.take_errors())
        parser = trt.OnnxParser(network, self.logger)
        started_s = time.monotonic()
        is_parsed = parser.parse_from_file(path)
        self.report["parse_s"] = time.monotonic() - started_s
        if not is_parsed or parser.num_errors:
            raise self.refusal(parser, path)
        self.log.take_errors()
        return network, parser

    def refusal(self, parser, path):
        """Return the BuildError for what the parser did not take."""
        errors = self.log.take_errors()
        problems = [parser.get_error(index) for index in range(parser.num_errors)]
        if not problems:
            at = self.log.last_node()
            return self.failure(
                "parse-failed",
                "TensorRT %s cannot parse the model%s; %s" % (self.version, " at %s" % at if at else "", REMEDY),
                errors,
            )
        sentences = []
        for problem in problems[:3]:
            name = operator = ""
            with contextlib.suppress(ValueError):  # then the file is no ONNX, and that is what the problem says
                name, operator = node_at(path, problem.node())
            if hasattr(problem, "node_name"):
                name = problem.node_name() or name
            if hasattr(problem, "node_operator"):
                operator = problem.node_operator() or operator
            where = "node %r (%s)" % (name, operator) if name or operator else "the model"
            text = " ".join(str(problem.desc()).split())
            remedy = next((remedy for sign, remedy in REMEDIES if sign in text), REMEDY)
            sentences.append("TensorRT %s cannot parse %s: %s; %s" % (self.version, where, text, remedy))
        if len(problems) > 3:
            sentences.append("and %d more" % (len(problems) - 3))
        return self.failure("parse-failed", "; ".join(sentences), [])

    def profile(self, builder, network):
        """Return the optimization profile of the dynamic axes, or None where there is none.

        Raises:
            BuildError: an axis has no range, or a range is not one of this model's.
        """
        tensors = {}
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            tensors[tensor.name] = tuple(tensor.shape)
        dynamic = sorted(name for name, shape in tensors.items() if -1 in shape)
        if not dynamic:
            return None
        profile = builder.create_optimization_profile()
        for name in dynamic:
            ranges = self.kit.profiles.get(name)
            if ranges is None:
                raise BuildError(
                    "bad-option",
                    "input %r has axes of any length %s and no range; give -O axes=name=min:opt:max"
                    % (name, tensors[name]),
                )
            try:
                profile.set_shape(name, tuple(ranges["min"]), tuple(ranges["opt"]), tuple(ranges["max"]))
            except (ValueError, TypeError, RuntimeError) as error:
                raise BuildError(
                    "bad-option",
                    "TensorRT does not take the range %s of input %r (%s); give -O axes=name=min:opt:max"
                    % (ranges, name, error),
                ) from error
        return profile

    def keep_float32(self, network):
        """Pin the layers of the kit's float32 nodes, in a weakly typed network.

        Returns:
            Whether any was pinned.
        """
        trt = self.trt
        wanted, found = self.kit.float32_nodes, set()
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            node = layer.name
            if node not in wanted and hasattr(layer, "metadata"):
                node = next(
                    (name for name in re.findall(r"\[ONNX Layer: (.*?)\]", layer.metadata) if name in wanted), ""
                )
            outputs = [layer.get_output(number) for number in range(layer.num_outputs)]
            # Shapes and indices are integers and stay so; a precision asked of them is an error.
            if node not in wanted or any(tensor.dtype not in (trt.float32, trt.float16) for tensor in outputs):
                continue
            layer.precision = trt.float32
            for number in range(layer.num_outputs):
                layer.set_output_type(number, trt.float32)
            found.add(node)
        lost = sorted(set(wanted) - found)
        if lost:
            self.note(
                "no layer bears the name of %s, which was to stay float32 (%s); it may compute in half floats"
                % (lost[0], wanted[lost[0]])
                + (", nor that of %d more" % (len(lost) - 1) if len(lost) > 1 else "")
            )
        return bool(found)

    # ---- configuration

    def workspace_bytes(self):
        """Return the limit for TensorRT's scratch memory: what was asked, or a share of what is free; None: unknown."""
        if self.options["workspace_mib"]:
            return int(self.options["workspace_mib"]) << 20
        try:
            free = Driver().free_bytes()
        except NoDriver as error:
            self.note("the free memory of the GPU cannot be read (%s); TensorRT's own limit holds" % error)
            return None
        if self.device["is_integrated"]:
            # A Jetson's driver counts the page cache as used; the kernel would give it back.
            free = max(free, read_memory_kib("proc/meminfo", "MemAvailable") * 1024)
            return int(min(free, self.device["memory_bytes"]) * INTEGRATED_SHARE)
        return int(free * DISCRETE_SHARE)

    def flag(self, config, name, why):
        """Set a builder flag.

        Raises:
            BuildError: this version does not have it.
        """
        kinds = self.trt.BuilderFlag
        if getattr(kinds, name, None) is None:
            raise BuildError("bad-option", "TensorRT %s has no %s; %s" % (self.version, name, why))
        config.set_flag(getattr(kinds, name))
        if name not in self.flags:
            self.flags.append(name)

    def configuration(self, builder, network, profile):
        """Return a configuration for one build.

        Raises:
            BuildError: something was asked for that this version or device does not have.
        """
        trt, options, kit = self.trt, self.options, self.kit
        config = builder.create_builder_config()
        if self.report.get("workspace_bytes"):
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.report["workspace_bytes"])
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # By itself TensorRT multiplies float32 with 10 bits of mantissa; what stays float32 stays so for a reason.
        config.clear_flag(trt.BuilderFlag.TF32)
        if profile is not None and config.add_optimization_profile(profile) < 0:
            raise self.failure(
                "bad-option", "TensorRT does not take the ranges of the dynamic axes", self.log.take_errors()
            )
        if options["optimization_level"] >= 0:
            if not hasattr(config, "builder_optimization_level"):
                raise BuildError(
                    "bad-option", "TensorRT %s has no optimization level; leave optimization_level at -1" % self.version
                )
            config.builder_optimization_level = int(options["optimization_level"])
        if not self.is_typed:
            if kit.precision != "fp32" and kit.float_type == "float16":
                self.flag(config, "FP16", "compile with -O float_type=float32")
                if kit.float32_nodes and self.keep_float32(network):
                    self.flag(config, "OBEY_PRECISION_CONSTRAINTS", "compile with -O float_type=float32")
            if kit.has_int8:  # all scales are in the graph; no calibrator is ever given
                self.flag(config, "INT8", "compile for fp16")
        if options["refit"]:
            self.flag(config, "REFIT", "leave refit off")
        if options["version_compatible"]:
            self.flag(config, "VERSION_COMPATIBLE", "it needs 8.6 or newer; leave version_compatible off")
        if self.dla_core >= 0:
            self.put_on_dla(builder, network, config)
        monitor = monitor_for(trt, self.progress)
        if monitor is not None and hasattr(config, "progress_monitor"):
            config.progress_monitor = monitor
            self.monitor = monitor  # TensorRT keeps no reference
            self.progress.has_monitor = True
        return config

    def put_on_dla(self, builder, network, config):
        """Ask for the deep-learning accelerator, and note which layers it takes."""
        trt, cores = self.trt, builder.num_DLA_cores
        if self.dla_core >= cores:
            raise BuildError(
                "bad-option",
                "dla_core is %d and this device has %d DLA cores for TensorRT %s; leave dla_core at -1"
                % (self.dla_core, cores, self.version),
            )
        if self.kit.precision == "fp32":
            raise BuildError("bad-option", "DLA computes no float32; compile for fp16 or int8, or leave dla_core at -1")
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = self.dla_core
        self.flag(config, "GPU_FALLBACK", "leave dla_core at -1")
        placed = {}
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            placed[layer.name] = "dla" if config.can_run_on_DLA(layer) else "gpu"
        self.report["dla"] = placed
        self.note(
            "%d of %d layers can run on DLA core %d; the rest falls back to the GPU"
            % (sum(where == "dla" for where in placed.values()), len(placed), self.dla_core)
        )

    def use_timing_cache(self, config, content):
        """Give a configuration a timing cache, with `content` if it fits this device and version; say whether.

        What was timed once is then not timed again, and chosen as before.
        """
        cache = config.create_timing_cache(content) if content else None
        fits = cache is not None and config.set_timing_cache(cache, False)
        if not fits:
            config.set_timing_cache(config.create_timing_cache(b""), False)
        if content and not fits:
            self.note(
                "the timing cache at hand is damaged, or was made by another TensorRT or for another GPU; an empty one "
                "takes its place"
            )
        self.log.take_errors()
        return fits

    def cache_content(self, config):
        """Return the bytes of a configuration's timing cache, b"" where there is none."""
        cache = config.get_timing_cache()
        serialized = cache.serialize() if cache is not None else None
        return bytes(serialized) if serialized is not None else b""

    # ---- building

    def build_once(self, builder, network, config, number):
        """Return (engine's bytes, seconds).

        Raises:
            BuildError: TensorRT made none.
            TimeIsUp: it was stopped.
        """
        count = int(self.options["builds"])
        self.progress.begin("building the engine" + (" (%d of %d)" % (number, count) if count > 1 else ""))
        started_s = time.monotonic()
        plan = builder.build_serialized_network(network, config)
        seconds = time.monotonic() - started_s
        errors = self.log.take_errors()
        if plan is not None:
            return bytes(plan), seconds
        if self.progress.is_over:
            raise TimeIsUp(
                "the time limit of %g s is over at %s"
                % (self.progress.limit_s, self.log.last_node() or "the first layer")
            )
        raise self.no_engine(errors)

    def no_engine(self, errors):
        """Return the BuildError for a build that returned nothing, naming the layer where TensorRT does."""
        words = " ".join(errors)
        found = NO_KERNEL.search(words)
        at = found.group("name") if found else self.log.last_node()
        what = "TensorRT %s built no engine%s" % (self.version, "; it stopped at %s" % at if at else "")
        if any(sign in words.lower() for sign in NO_WORKSPACE):
            return BuildError(
                "out-of-memory",
                "%s for lack of workspace, whose limit is %s MiB; give -O workspace_mib=... more; TensorRT says: %s"
                % (what, (self.report.get("workspace_bytes") or 0) >> 20, " ".join(words.split())[:400]),
            )
        if "timing cache" in words.lower():
            return self.failure("build-failed", what + "; compile with -O pin_tactics=false", errors)
        return self.failure("build-failed", what + "; its log's last lines say more", errors)

    def engines(self, builder, network, profile, given):
        """Build as often as asked; return [(engine's bytes, timing cache's bytes, seconds)].

        Pinned, each build after the first takes the first's timing cache and, where the version can, fails rather than
        time a kernel anew. Not pinned, each times everything by itself, so that they show how far builds differ.
        """
        made = []
        is_pinned = False
        count = int(self.options["builds"])
        if count > 1 and not self.options["pin_tactics"]:
            given = b""
        for number in range(1, count + 1):
            config = self.configuration(builder, network, profile)
            pins = number > 1 and self.options["pin_tactics"]
            was_used = self.use_timing_cache(config, made[0][1] if pins else given)
            if number == 1:
                self.report["used_timing_cache"] = was_used
            if pins and hasattr(self.trt.BuilderFlag, "ERROR_ON_TIMING_CACHE_MISS"):
                self.flag(config, "ERROR_ON_TIMING_CACHE_MISS", "")
                is_pinned = True
            elif pins:
                self.note(
                    "TensorRT %s cannot be told to fail when its timing cache misses; later builds took the first's "
                    "cache, and whether they chose the same kernels is compared" % self.version
                )
            try:
                plan, seconds = self.build_once(builder, network, config, number)
            except TimeIsUp as error:
                if made:
                    self.note("%s; %d of %d builds were made" % (error, len(made), count))
                    break
                self.report["stopped"] = str(error)
                return [(None, self.cache_content(config), 0.0)]
            made.append((plan, self.cache_content(config), seconds))
        self.report["is_pinned"] = is_pinned
        return made

    # ---- looking at what was made

    def runtime(self):
        trt = self.trt
        runtime = trt.Runtime(self.logger)
        if self.dla_core >= 0:
            runtime.DLA_core = self.dla_core
        if self.options["version_compatible"] and hasattr(runtime, "engine_host_code_allowed"):
            runtime.engine_host_code_allowed = True  # a portable plan brings its own runtime; we have just made it
        return runtime

    def inspect(self, runtime, plan):
        """Load a plan; return (its layers as the inspector's JSON, its inputs and outputs, its memory).

        Raises:
            BuildError: it does not load on the device that it was built on.
        """
        trt = self.trt
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.failure("build-failed", "the engine that was built does not load again", self.log.take_errors())
        ports = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(name).name
            ports.append({
                "name": name,
                "mode": "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output",
                "dtype": DTYPES.get(kind, kind.lower()),
                "shape": [int(axis) for axis in engine.get_tensor_shape(name)],
            })  # fmt: skip
        memory = None
        if hasattr(engine, "device_memory_size_v2"):
            memory = int(engine.device_memory_size_v2)
        elif hasattr(engine, "device_memory_size"):
            memory = int(engine.device_memory_size)
        inspector = engine.create_engine_inspector()
        context = engine.create_execution_context()
        if context is not None:
            for port in ports:
                if port["mode"] == "input" and -1 in port["shape"]:
                    context.set_input_shape(port["name"], tuple(self.kit.profiles[port["name"]]["opt"]))
            inspector.execution_context = context
        else:
            self.note("there was no memory for the engine's activations, so its layers are told without their shapes")
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        self.log.take_errors()
        return text, ports, memory

    # ---- new weights for an old engine

    def refit(self, plan, old_kit, form, path):
        """Return an old engine with the weights of an ONNX file, or None with a note why not.

        Only where nothing but weights that the engine can replace has changed since the kit that it was made of: an
        engine also holds what was computed from weights, and TensorRT does not say which.
        """
        trt, old = self.trt, Kit(old_kit)
        old_path = old.extract(form, os.path.join(self.folder, "old.onnx"))
        (old_weights, old_rest), (weights, rest) = weights_of(old_path), weights_of(path)
        if (rest, self.kit.asks()) != (old_rest, old.asks()) or set(weights) != set(old_weights):
            self.note("more than weights has changed since the older engine; the engine is built anew")
            return None
        engine = self.runtime().deserialize_cuda_engine(plan)
        self.log.take_errors()
        if engine is None or not engine.refittable:
            self.note("the older engine does not load here or was not built with -O refit=true; it is built anew")
            return None
        refitter = trt.Refitter(engine, self.logger)
        fixed = sorted(
            name for name in weights
            if weights[name] != old_weights[name] and name not in set(refitter.get_all_weights())
        )  # fmt: skip
        if fixed:
            self.note("the older engine cannot take new values of %r; the engine is built anew" % fixed[0])
            return None
        takes_files = hasattr(trt, "OnnxParserRefitter")
        if not takes_files and importlib.util.find_spec("numpy") is None:
            self.note("new weights are handed to TensorRT %s as arrays, and %s has no numpy; the engine is built anew"
                      % (self.version, sys.executable))  # fmt: skip
            return None
        if takes_files:
            is_given = trt.OnnxParserRefitter(refitter, self.logger).refit_from_file(path)
        else:
            is_given = self.give_weights(refitter, path)
        if not is_given or refitter.get_missing_weights() or not refitter.refit_cuda_engine():
            errors = self.log.take_errors()
            self.note(
                "the older engine did not take the new weights (%s); the engine is built anew"
                % (" | ".join(errors[:2]) or "TensorRT does not say why")
            )
            return None
        self.report["refitted"] = True
        return bytes(engine.serialize())

    def give_weights(self, refitter, path):
        """Hand the weights of an ONNX file to an engine by name; return whether it took all."""
        import numpy as np  # this version's Weights are made of arrays only

        wanted, kept = set(refitter.get_all_weights()), []
        for name, dtype, raw in raw_weights(path, wanted):
            kept.append(np.frombuffer(raw, dtype))  # must live until the engine has been refitted
            if not refitter.set_named_weights(name, self.trt.Weights(kept[-1])):
                return False
        self.kept_weights = kept
        return True


class TimeIsUp(Exception):
    """TensorRT stopped because we asked it to."""


def import_tensorrt():
    """Return the module.

    Raises:
        BuildError: this Python cannot import it.
    """
    version, why = installed_tensorrt(may_import=True)
    if not version:
        raise BuildError("missing-runtime", why)
    return importlib.import_module("tensorrt")


def checked_options(given):
    """Return all options that the builder knows.

    Raises:
        BuildError: one is not what it should be.
    """
    options = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    for name, low in (
        ("workspace_mib", 0),
        ("time_limit_s", 1),
        ("optimization_level", -1),
        ("builds", 1),
        ("dla_core", -1),
    ):
        if isinstance(options[name], bool) or not isinstance(options[name], (int, float)) or options[name] < low:
            raise BuildError("bad-option", "%s is %r; give %d or more" % (name, options[name], low))
    return options


def read_file(path):
    """Return a shipped file's bytes, b"" where none was shipped."""
    if not path:
        return b""
    with open(path, "rb") as stream:
        return stream.read()


def build(files, options, folder, tell):
    """Turn a kit into an engine for this device.

    Args:
        files: "kit"; optional "timing_cache"; optional "engine" and "engine_kit", an older engine and the kit that it
            was made of, to be refitted where only weights have changed.
        options: the back end's -O options.
        folder: where files are written.
        tell: called about once a second with a text, and steps done and in all where they are known.

    Returns:
        (report, {name: file in folder}): "engine", "layers" (the engine inspector's JSON), "timing_cache"; of builds
        after the first "engine-2", "layers-2" and, if they are not pinned, "timing_cache-2" ... Where the time limit
        stopped the build, the report has "stopped", a sentence, and "timing_cache" is all that was made.

    Raises:
        BuildError: no engine; its text is a sentence.
    """
    options = checked_options(options)
    facts = probe()
    if facts["driver"]:
        raise BuildError("no-driver", facts["driver"])
    trt = import_tensorrt()
    kit = Kit(files["kit"])
    log = Log()
    with Progress(tell, log, float(options["time_limit_s"])) as progress:
        work = Build(trt, kit, options, folder, log, progress, facts)
        try:
            return make(work, files)
        except MemoryError as error:
            raise BuildError(
                "out-of-memory",
                "the device ran out of memory while %s; end other programs there" % progress.doing,
            ) from error
        except (RuntimeError, TypeError) as error:  # what TensorRT's Python raises when its C++ returns nothing
            raise work.failure(
                "build-failed", "TensorRT %s failed while %s: %s" % (work.version, progress.doing, error),
                log.take_errors(),
            ) from error  # fmt: skip


def make(work, files):
    """Do the work of build()."""
    form = "typed.onnx" if work.is_typed else "weak.onnx"
    path = work.kit.extract(form, os.path.join(work.folder, "form.onnx"))
    describe(work)
    plans = []
    if work.options["refit"] and files.get("engine") and files.get("engine_kit"):
        work.progress.begin("refitting the older engine")
        started_s = time.monotonic()
        plan = work.refit(read_file(files["engine"]), files["engine_kit"], form, path)
        if plan is not None:
            work.report["is_pinned"] = False
            plans = [(plan, read_file(files.get("timing_cache")), time.monotonic() - started_s)]
    elif work.options["refit"] and files.get("engine"):
        work.note("an older engine came without the kit that it was made of; the engine is built anew")
    if not plans:
        work.progress.begin("parsing the model")
        builder = work.trt.Builder(work.logger)
        network, parser = work.parse(builder, path)
        work.report["workspace_bytes"] = work.workspace_bytes()
        profile = work.profile(builder, network)
        plans = work.engines(builder, network, profile, read_file(files.get("timing_cache")))
        del parser
    made = written(work, plans)
    work.report["flags"] = work.flags
    work.report["notes"] = work.notes
    return work.report, made


def describe(work):
    """Start the report: what the engine is made with and for."""
    work.report.update({
        "tensorrt": work.version,
        "compute_capability": work.device["compute_capability"],
        "gpu": work.device["name"],
        "driver": work.facts["driver_version"],
        "cuda": work.facts["cuda_driver"],
        "jetpack": work.facts["jetpack"],
        "l4t": work.facts["l4t"],
        "typed": work.is_typed,
        "workspace_bytes": None,
        "parse_s": 0.0,
        "dla": {},
        "refitted": False,
        "used_timing_cache": False,
    })  # fmt: skip
    if work.kit.precision == "fp32" or work.kit.float_type == "float32":
        work.note("TF32 is off: float32 is multiplied as float32")


def written(work, plans):
    """Write engines, layers and timing caches; complete the report."""
    made, builds, layers = {}, [], []
    cache = plans[0][1]
    work.report["timing_cache_sha256"] = hashlib.sha256(cache).hexdigest() if cache else ""
    if cache:
        made["timing_cache"] = write(work, "timing.cache", cache)
    if plans[0][0] is None:
        work.report["builds"], work.report["build_s"] = [], 0.0
        return made
    work.progress.begin("reading the engine's layers")
    runtime = work.runtime()
    for number, (plan, cache, seconds) in enumerate(plans, start=1):
        after = "" if number == 1 else "-%d" % number
        text, ports, memory = work.inspect(runtime, plan)
        if number == 1:
            work.report["io"], work.report["engine_memory_bytes"] = ports, memory
        made["engine" + after] = write(work, "model%s.engine" % after, plan)
        made["layers" + after] = write(work, "layers%s.json" % after, text.encode("utf-8"))
        if number > 1 and not work.options["pin_tactics"] and cache:
            made["timing_cache" + after] = write(work, "timing%s.cache" % after, cache)
        layers.append(tactics(text))
        builds.append({
            "seconds": seconds,
            "sha256": hashlib.sha256(plan).hexdigest(),
            "size_bytes": len(plan),
            "timing_cache_sha256": hashlib.sha256(cache).hexdigest() if cache else "",
            "tactics_sha256": hashlib.sha256(json.dumps(layers[-1], sort_keys=True).encode("utf-8")).hexdigest(),
        })  # fmt: skip
    work.report["builds"] = builds
    work.report["build_s"] = sum(build["seconds"] for build in builds)
    if work.options["pin_tactics"]:
        for number, other in enumerate(layers[1:], start=2):
            differing = sorted(name for name in {**layers[0], **other} if layers[0].get(name) != other.get(name))
            if differing:
                work.report["is_pinned"] = False
                work.note("build %d chose another kernel than the first for %s" % (number, ", ".join(differing[:5])))
    return made


def tactics(text):
    """Return {layer: its kernel} of the inspector's JSON."""
    try:
        layers = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return {}
    return {
        layer["Name"]: str(layer.get("TacticName") or layer.get("TacticValue") or layer.get("TacticId") or "")
        for layer in layers
        if isinstance(layer, dict) and "Name" in layer
    }


def write(work, name, content):
    """Write a file into the folder; return its name."""
    with open(os.path.join(work.folder, name), "wb") as stream:
        stream.write(content)
    return name
