"""The device half of MNN: CPU, one Interpreter with one Session; every input is checked here, for MNN checks none."""

import mmap
import os
import statistics
import struct
import time

import MNN
import numpy as np

# What MNN takes for each of these options without a word, and then ignores where it does not know the word.
LEVELS = ("high", "normal", "low")
# Level of the hint WINOGRAD_MEMORY_LEVEL. By itself MNN takes the largest tiles, measured to be off by up to 9e-4
# of the largest value of one 3x3 convolution; small tiles by 3e-7, for a fifth to a half more time.
WINOGRAD_HINT, WINOGRAD = 3, {"none": 0, "small": 1, "large": 3}
# Numbers of SessionInfoCode in MNN/Interpreter.hpp. MNN's Python hands an integer over as the float of the same bits.
MEMORY_MIB, RESIZE_STATUS, THREADS = 0, 3, 4
# Numbers of SessionMode: operators can only be watched in the first; the second is what a program would ship.
DEBUG, RELEASE = 0, 1
# Our name of a type -> MNN's Python's.
TYPES = {
    "float32": MNN.Halide_Type_Float, "float64": MNN.Halide_Type_Double, "int64": MNN.Halide_Type_Int64,
    "int32": MNN.Halide_Type_Int, "uint8": MNN.Halide_Type_Uint8,
}  # fmt: skip
# Numbers of DataType in MNN's schema (Tensor.fbs) -> our name.
DECLARED = {1: "float32", 2: "float64", 3: "int32", 4: "uint8", 9: "int64"}
# What data may be where the file has another type: MNN's converter narrows what its operators have no kernels for.
WIDER = {"int32": ("int64", "bool")}
# In MNN's schema (MNN.fbs): the parameters of an operator that is an input.
INPUT = 21


class File:
    """The inputs that a .mnn file declares, read from its FlatBuffer; nothing else of it is touched.

    A mapping, because the bytes of a large file would count as memory of the process that is measured.
    """

    def __init__(self, path):
        self.path = path

    def inputs(self):
        """Return input -> (type, shape), -1 for an axis that the caller chooses.

        Raises:
            ValueError: the file is damaged, or an input has a type that MNN's Python cannot hand over.
        """
        try:
            with open(self.path, "rb") as stream:
                if os.fstat(stream.fileno()).st_size == 0:
                    raise ValueError("it is empty")
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as self.bytes:
                    found = dict(self.declared())
        except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
            raise ValueError("the artifact is not a whole .mnn file (%s); compile it again" % error) from error
        finally:
            self.bytes = None
        if not found:
            raise ValueError("the artifact has no input; compile it again")
        for name, (dtype, _) in found.items():
            if dtype not in DECLARED:
                raise ValueError("input %r has MNN's type number %d, which its Python does not take" % (name, dtype))
        return {name: (DECLARED[dtype], shape) for name, (dtype, shape) in found.items()}

    def declared(self):
        """Yield (tensor's name, (number of its type, shape)) of each input."""
        net = self.follow(0)
        names = self.vector(self.place(net, 7))  # Net.tensorName
        for operator in self.vector(self.place(net, 3)):  # Net.oplists
            table = self.follow(operator)
            kind = self.place(table, 1)  # Op.main_type
            if kind is None or self.bytes[kind] != INPUT:
                continue
            main = self.follow(self.place(table, 2))  # Op.main
            (made,) = self.vector(self.place(table, 4))  # Op.outputIndexes
            start, length = self.string(names[self.number("i", made)])
            dims, dtype = self.place(main, 0), self.place(main, 1)  # Input.dims, Input.dtype
            shape = [self.number("i", axis) for axis in self.vector(dims)] if dims is not None else []
            name = self.bytes[start : start + length].decode("utf-8")
            yield name, (1 if dtype is None else self.number("i", dtype), shape)

    def number(self, kind, position):
        if position is None or position < 0:
            raise IndexError("a field is missing")
        return struct.unpack_from("<" + kind, self.bytes, position)[0]

    def follow(self, position):
        """Return what the offset at a position leads to."""
        return self.number("I", position) + (position or 0)

    def place(self, table, field):
        """Return where a table's field stands, or None where the table does not have it."""
        fields = table - self.number("i", table)
        offset = 4 + 2 * field
        found = self.number("H", fields + offset) if offset < self.number("H", fields) else 0
        return table + found if found else None

    def string(self, position):
        start = self.follow(position)
        return start + 4, self.number("I", start)

    def vector(self, position):
        """Return where each item of a vector of 4-byte items stands."""
        start, count = self.string(position)
        if start + 4 * count > len(self.bytes):
            raise IndexError("a list runs over its end")
        return range(start, start + 4 * count, 4)


class Port:
    """One input or output of the model, and the artifact's tensor that it lies in.

    Attributes:
        name: the model's.
        tensor: the artifact's name of it.
        dtype: of an input, the file's; of an output, the model's where it is known to differ, else "".
        shape: of an input, the file's, -1 where the caller chooses.
        permutation: axis i of the artifact's tensor is axis permutation[i] of the model's; empty: the same axes.
    """

    def __init__(self, name, tensor, options, dtype="", shape=None):
        self.name, self.tensor, self.shape = name, tensor, shape
        self.dtype = dtype or options.get("dtype", "")
        self.permutation = [int(axis) for axis in options.get("permutation", ())]
        axes = len(self.permutation) if shape is None else len(shape)
        if self.permutation and sorted(self.permutation) != list(range(axes)):
            raise ValueError(
                "%r has %d axes in the artifact, which the permutation %s does not order; compile it again"
                % (name, axes, self.permutation)
            )

    @property
    def inverse(self):
        return [self.permutation.index(axis) for axis in range(len(self.permutation))]

    def array(self, data, dtype, shape):
        """Return what is to be written into the artifact's tensor, in its axes and type.

        Raises:
            ValueError: another type, another shape, or values that the artifact's type cannot hold.
        """
        if dtype != self.dtype and dtype not in WIDER.get(self.dtype, ()):
            raise ValueError("input %r takes %s, not %s" % (self.name, self.dtype, dtype))
        want = [self.shape[axis] for axis in self.inverse] if self.permutation else self.shape
        shape = [int(axis) for axis in shape]
        fits = len(want) == len(shape) and all(axis in (-1, got) for axis, got in zip(want, shape))
        if not fits or 0 in shape:
            raise ValueError("input %r takes the shape %s, not %s" % (self.name, shown(want), shape))
        values = np.frombuffer(data, dtype=dtype)
        if values.size != int(np.prod(shape)):
            raise ValueError("input %r holds %d values, which is not the shape %s" % (self.name, values.size, shape))
        values = values.reshape(shape)
        if dtype == "int64" and self.dtype == "int32":
            limits = np.iinfo(np.int32)
            if not limits.min <= values.min() <= values.max() <= limits.max:
                raise ValueError("input %r holds values beyond int32, which the artifact has" % self.name)
        values = values.transpose(self.permutation) if self.permutation else values
        return values.astype(self.dtype, order="C", copy=False)

    def answer(self, array):
        """Return an output's array in the model's axes and type."""
        array = array.transpose(self.inverse) if self.permutation else array
        return array.astype(self.dtype or array.dtype, order="C", copy=False)


def shown(shape):
    """Return a shape for a person."""
    return "[%s]" % ", ".join("any" if axis == -1 else str(axis) for axis in shape)


def host_tensor(like, array=None):
    """Return a tensor in plain memory with the shape, type and order of axes of one of a session.

    A session may keep its own in blocks of four channels or in half floats; copying to or from such a one converts.
    """
    order = MNN.Tensor_DimensionType_Caffe
    if like.getDimensionType() == MNN.Tensor_DimensionType_Tensorflow:
        order = MNN.Tensor_DimensionType_Tensorflow
    shape, kind = tuple(like.getShape()), like.getDataType()
    names = [name for name, known in TYPES.items() if known is kind]
    if not names:
        raise ValueError("a tensor has a type that MNN's Python cannot hand over")
    return MNN.Tensor(shape, kind, np.zeros(shape, names[0]) if array is None else array, order)


class Network:
    """MNN's interpreter of an artifact, with one session of it."""

    def __init__(self, artifact, config, mode):
        try:
            self.interpreter = MNN.Interpreter(artifact)
            self.interpreter.setSessionMode(mode)
            self.interpreter.setSessionHint(WINOGRAD_HINT, WINOGRAD[config["winograd"]])
            self.session = self.interpreter.createSession({key: config[key] for key in config if key != "winograd"})
        except Exception as error:  # MNN raises nothing more special
            raise ValueError("MNN %s does not load the artifact (%s)" % (MNN.version(), error)) from error
        self.feeds = None

    def close(self):
        """Let everything go, in this order: a tensor whose interpreter is gone points to freed memory."""
        self.feeds = self.session = None
        self.interpreter = None

    def info(self, code):
        return self.interpreter.getSessionInfo(self.session, code)

    def integer(self, code):
        return struct.unpack("<i", struct.pack("<f", self.info(code)))[0]

    def resize(self, shapes):
        """Give the inputs these shapes: tensor -> shape.

        Raises:
            ValueError: some operator cannot compute with them.
        """
        self.feeds = None
        for tensor, shape in shapes.items():
            self.interpreter.resizeTensor(self.interpreter.getSessionInput(self.session, tensor), tuple(shape))
        self.interpreter.resizeSession(self.session)  # says True in any case
        if self.integer(RESIZE_STATUS) != 0:
            raise ValueError(
                "the artifact cannot take inputs of these shapes, %s; MNN says on stderr at which operator"
                % ", ".join("%s %s" % (tensor, list(shape)) for tensor, shape in sorted(shapes.items()))
            )

    def bind(self, arrays):
        """Take what the inputs are to hold: tensor -> array in the artifact's type and the shape it was resized to."""
        feeds = []
        for tensor, array in arrays.items():
            target = self.interpreter.getSessionInput(self.session, tensor)
            if tuple(target.getShape()) != array.shape or target.getDataType() is not TYPES[array.dtype.name]:
                raise ValueError("MNN made something else of the input %r than its file declares" % tensor)
            feeds.append((target, host_tensor(target, array)))
        self.feeds = feeds

    def feed(self):
        for target, source in self.feeds:
            target.copyFrom(source)

    def run(self):
        self.feed()
        demand(self.interpreter.runSession(self.session))

    def watched(self):
        """Compute once; return [(operator's name, its kind, nanoseconds)]."""
        # What these two raise would end the process: they do nothing that can fail.
        names, starts, ends = [], [], []

        def before(_tensors, operator):
            names.append((operator.getName(), operator.getType().strip()))
            starts.append(time.perf_counter_ns())
            return True

        def after(_tensors, _operator):
            ends.append(time.perf_counter_ns())
            return True

        self.feed()
        demand(self.interpreter.runSessionWithCallBackInfo(self.session, before, after))
        return [(*name, end - start) for name, start, end in zip(names, starts, ends)]


def demand(code):
    """Refuse an error number of MNN's."""
    if code != 0:
        raise RuntimeError("MNN could not compute the model; its error number is %d" % code)


class Session:
    """One loaded artifact.

    Options:
        threads: default 1.
        precision: default "high", float32; "normal" and "low" allow 16 bits where the processor has them.
        memory: default "high"; "low" keeps small weights small.
        power: default "normal": threads are not tied to cores.
        winograd: default "small": tiles of fast convolutions; "large" is faster and less exact, "none" slower.
        ports: where the artifact keeps the model's inputs and outputs, by the model's names; a name without a port is
            the artifact's.
    """

    runtime = "mnn " + MNN.version()

    def __init__(self, artifact, options):
        threads = int(options.get("threads", 1))
        if threads < 1:
            raise ValueError("threads is %d; give 1 or more" % threads)
        self._config = {"backend": "CPU", "numThread": threads}
        for name, default in (("precision", "high"), ("memory", "high"), ("power", "normal")):
            self._config[name] = options.get(name, default)
            if self._config[name] not in LEVELS:
                raise ValueError("%s is %r; give high, normal or low" % (name, self._config[name]))
        self._config["winograd"] = options.get("winograd", "small")
        if self._config["winograd"] not in WINOGRAD:
            raise ValueError("winograd is %r; give none, small or large" % (self._config["winograd"],))
        self._artifact = artifact
        declared = File(artifact).inputs()
        self._network = Network(artifact, self._config, RELEASE)
        self._inputs, self._outputs = self._ports(declared, options.get("ports", {}))
        # Not always what was asked for: 32 at most, and no more than the process's first session of several threads.
        self._threads = self._network.integer(THREADS)
        self._arrays = self._shapes = None
        self._has_answers = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._network.close()
        self._arrays = self._shapes = None

    def _ports(self, declared, options):
        """Return the ports of the inputs and of the outputs, by the model's names."""
        interpreter, session = self._network.interpreter, self._network.session
        found = set(interpreter.getSessionInputAll(session))
        made = set(interpreter.getSessionOutputAll(session))
        if set(declared) != found:
            raise ValueError(
                "the artifact declares the inputs %s and MNN makes %s of it; compile it again"
                % (sorted(declared), sorted(found))
            )
        names = {place.get("tensor", name): name for name, place in options.items()}
        for tensor, name in names.items():
            if tensor not in found and tensor not in made:
                raise ValueError(
                    "the artifact has no tensor %r, where %r should be (it has %s); compile it again"
                    % (tensor, name, ", ".join(sorted(found | made)))
                )
        inputs, outputs = {}, {}
        for tensor, (dtype, shape) in declared.items():
            name = names.get(tensor, tensor)
            inputs[name] = Port(name, tensor, options.get(name, {}), dtype, shape)
        for tensor in sorted(made):
            name = names.get(tensor, tensor)
            outputs[name] = Port(name, tensor, options.get(name, {}))
        return inputs, outputs

    def boundary(self):
        moved = any(port.permutation for port in [*self._inputs.values(), *self._outputs.values()])
        levels = ", ".join(
            "%s %s" % (name, self._config[name]) for name in ("precision", "memory", "power", "winograd")
        )
        return {
            # MNN computes in the memory of its inputs: what lies there after an inference is something else.
            "includes_input_copy": True,
            "includes_output_copy": False,
            "threads": self._threads,
            "detail": "Tensor.copyFrom and Interpreter.runSession, CPU, %s%s"
            % (levels, ", axes permuted outside" if moved else ""),
        }

    def bind(self, inputs):
        if set(inputs) != set(self._inputs):
            raise ValueError("the model takes the inputs %s, not %s" % (sorted(self._inputs), sorted(inputs)))
        arrays = {port.tensor: port.array(*inputs[name]) for name, port in self._inputs.items()}
        shapes = {tensor: array.shape for tensor, array in arrays.items()}
        self._has_answers = False
        if shapes != self._shapes:
            self._arrays = self._shapes = None
            self._network.resize(shapes)
            self._shapes = shapes
        self._network.bind(arrays)
        self._arrays = arrays

    def _demand_inputs(self):
        if self._arrays is None:
            raise RuntimeError("there are no inputs yet; bind them first")

    def infer(self):
        self._demand_inputs()
        self._has_answers = False
        self._network.run()
        self._has_answers = True

    def outputs(self):
        if not self._has_answers:
            raise RuntimeError("there are no answers yet; infer first")
        answers = {}
        for name, port in self._outputs.items():
            tensor = self._network.interpreter.getSessionOutput(self._network.session, port.tensor)
            host = host_tensor(tensor)
            if not tensor.copyToHostTensor(host):
                raise RuntimeError("MNN could not hand over the output %r" % name)
            array = port.answer(host.getNumpyData().reshape(tensor.getShape()))
            answers[name] = (array.tobytes(), array.dtype.name, list(array.shape))
        return answers

    def memory_bytes(self):
        """Return the memory that MNN says it holds for this session: its tensors and what it keeps of the weights."""
        return round(self._network.info(MEMORY_MIB) * 2**20)

    def profile(self, runs=10):
        """Return [(operator's name, its kind, seconds)] in order, each the median of `runs` inferences.

        A session of its own computes them, in which MNN calls us around every operator. Their sum is more than an
        inference takes, and nothing of it is inside what infer takes.

        Raises:
            RuntimeError: nothing is bound, or MNN could not compute.
        """
        self._demand_inputs()
        network = Network(self._artifact, self._config, DEBUG)
        try:
            network.resize(self._shapes)
            network.bind(self._arrays)
            passes = [network.watched() for _ in range(runs)]
        finally:
            network.close()
        times = [statistics.median(one[2] for one in same) for same in zip(*passes)]
        return [(name, kind, time_ns / 1e9) for (name, kind, _), time_ns in zip(passes[0], times)]
