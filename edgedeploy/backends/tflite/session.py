"""The device half of TFLite: CPU, one Interpreter of ai-edge-litert or of tflite-runtime."""

import collections
import importlib.metadata
import importlib.util

import numpy as np

# What data may be where the file has another type: its converter narrows what the runtime has no kernels for.
WIDER = {"int32": ("int64",)}
# What keeps a state from one inference to the next, where ONNX starts anew with each.
STATEFUL = {
    "UNIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_LSTM", "LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN",
    "BIDIRECTIONAL_SEQUENCE_RNN", "RNN", "SVDF",
}  # fmt: skip


def load_runtime():
    """Return (the distribution's name, its version, the module that has Interpreter).

    Raises:
        ModuleNotFoundError: neither runtime is installed.
        ImportError: tflite_runtime is, with a numpy that it fails with in words that do not say so.
    """
    if importlib.util.find_spec("ai_edge_litert") is not None:
        import ai_edge_litert.interpreter as module

        return "ai-edge-litert", version_of("ai-edge-litert"), module
    if importlib.util.find_spec("tflite_runtime") is None:
        raise ModuleNotFoundError("there is neither ai_edge_litert nor tflite_runtime", name="ai_edge_litert")
    if int(np.__version__.split(".")[0]) >= 2:
        error = ImportError(
            "tflite_runtime is built for numpy 1, and this interpreter has numpy %s; pip install 'numpy<2' there, or "
            "pip install ai-edge-litert, which works with both" % np.__version__
        )
        error.says_what_to_do = True
        raise error
    import tflite_runtime.interpreter as module

    return "tflite-runtime", version_of("tflite-runtime"), module


def version_of(distribution):
    """Return an installed version; boards' images carry runtimes that no package manager has put there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


NAME, VERSION, RUNTIME = load_runtime()


class Port:
    """One input or output of the model, and the artifact's tensor that it lies in.

    Attributes:
        name: the model's.
        index: of the artifact's tensor.
        dtype: the artifact's.
        shape: the artifact's, -1 where the caller chooses.
        permutation: axis i of the artifact's tensor is axis permutation[i] of the model's; empty: the same axes.
        model_dtype: the model's where it is known to differ, else "".
    """

    def __init__(self, name, details, options):
        self.name = name
        self.index = details["index"]
        self.dtype = np.dtype(details["dtype"]).name
        signature = details.get("shape_signature")
        # A file whose tensor says nothing about free axes has an empty signature.
        has_signature = signature is not None and len(signature) == len(details["shape"])
        self.shape = [int(axis) for axis in (signature if has_signature else details["shape"])]
        self.permutation = [int(axis) for axis in options.get("permutation", ())]
        self.model_dtype = options.get("dtype", "")
        if self.permutation and sorted(self.permutation) != list(range(len(self.shape))):
            raise ValueError(
                "%r has %d axes in the artifact, which the permutation %s does not order; compile it again"
                % (name, len(self.shape), self.permutation)
            )

    @property
    def inverse(self):
        return [self.permutation.index(axis) for axis in range(len(self.permutation))]

    def model_shape(self):
        """Return the shape that the model's tensor must have, -1 where it may be any."""
        return [self.shape[axis] for axis in self.inverse] if self.permutation else self.shape

    def array(self, data, dtype, shape):
        """Return what is to be written into the artifact's tensor, in its axes and type.

        Raises:
            ValueError: another type, another shape, or values that the artifact's type cannot hold.
        """
        if dtype != self.dtype and dtype not in WIDER.get(self.dtype, ()):
            raise ValueError("input %r takes %s, not %s" % (self.name, self.dtype, dtype))
        want, shape = self.model_shape(), [int(axis) for axis in shape]
        fits = len(want) == len(shape) and all(axis in (-1, got) for axis, got in zip(want, shape))
        if not fits or 0 in shape:
            raise ValueError("input %r takes the shape %s, not %s" % (self.name, shown(want), shape))
        values = np.frombuffer(data, dtype=dtype)
        if values.size != int(np.prod(shape)):
            raise ValueError("input %r holds %d values, which is not the shape %s" % (self.name, values.size, shape))
        values = values.reshape(shape)
        if dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            if values.size and not limits.min <= values.min() <= values.max() <= limits.max:
                raise ValueError("input %r holds values beyond %s, which the artifact has" % (self.name, self.dtype))
            values = values.astype(self.dtype)
        return values.transpose(self.permutation) if self.permutation else values

    def answer(self, array):
        """Return an output's array in the model's axes and type."""
        array = array.transpose(self.inverse) if self.permutation else array
        return array.astype(self.model_dtype or array.dtype, order="C", copy=False)


def ports_of(role, details, signature, options):
    """Return the ports of one role by the model's names: those that options give, the others by their own names.

    Args:
        role: "input" or "output".
        details: what the interpreter says of each tensor.
        signature: the file's name of it -> tensor's name, where the file has names besides those of tensors.
        options: the model's name -> {"tensor": of either kind of name, ...}.
    """
    tensors = {one["name"]: one for one in details}
    if len(tensors) != len({one["index"] for one in details}):
        raise ValueError("two %ss of the artifact have one name; compile it again" % role)
    if set(signature.values()) != set(tensors):
        signature = {name: name for name in tensors}
    ports = {}
    for name, place in options.items():
        given = place.get("tensor", name)
        tensor = given if given in tensors else signature.get(given)
        if tensor is not None:
            ports[name] = Port(name, tensors[tensor], place)
    taken = {port.index for port in ports.values()}
    for name, tensor in signature.items():
        if tensors[tensor]["index"] not in taken:
            ports[name] = Port(name, tensors[tensor], {})
    return ports


def shown(shape):
    """Return a shape for a person."""
    return "[%s]" % ", ".join("any" if axis == -1 else str(axis) for axis in shape)


class Session:
    """One loaded artifact.

    Options:
        threads: default 1.
        xnnpack: default True: XNNPACK takes over the operators that it has.
        ports: where the artifact keeps the model's inputs and outputs, by the model's names; a name without a port is
            the artifact's.
    """

    runtime = "tflite %s-%s" % (NAME, VERSION)

    def __init__(self, artifact, options):
        self._threads = int(options.get("threads", 1))
        if self._threads < 1:
            raise ValueError("threads is %d; give 1 or more" % self._threads)
        self._uses_xnnpack = bool(options.get("xnnpack", True))
        resolver = RUNTIME.OpResolverType
        kind = resolver.AUTO if self._uses_xnnpack else resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            self._interpreter = RUNTIME.Interpreter(
                model_path=artifact, num_threads=self._threads, experimental_op_resolver_type=kind
            )
        except (ValueError, RuntimeError) as error:
            raise ValueError("the artifact is not a whole .tflite file (%s); compile it again" % told(error)) from error
        self._inputs, self._outputs = self._ports(options.get("ports", {}))
        self._refuse_what_goes_wrong()
        self._has_state = any(node["op_name"] in STATEFUL for node in self._interpreter._get_ops_details())
        try:
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                "%s %s has no kernel for something in the artifact (%s)" % (NAME, VERSION, told(error))
            ) from error
        self._shapes = None
        self._has_answers = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._interpreter = self._shapes = None

    def _ports(self, options):
        """Return the ports of the inputs and of the outputs, by the model's names."""
        signed = self._signature()
        details = {"input": self._interpreter.get_input_details(), "output": self._interpreter.get_output_details()}
        inputs, outputs = (ports_of(role, details[role], signed[role], options) for role in ("input", "output"))
        unknown = [name for name in options if name not in inputs and name not in outputs]
        if unknown:
            tensors = sorted({one["name"] for found in details.values() for one in found})
            raise ValueError(
                "the artifact has no tensor %r, where %r should be (it has %s); compile it again"
                % (options[unknown[0]].get("tensor", unknown[0]), unknown[0], ", ".join(tensors))
            )
        return inputs, outputs

    def _signature(self):
        """Return the names that the file's only signature gives its inputs and outputs: role -> name -> tensor."""
        keys = list(self._interpreter.get_signature_list())
        if len(keys) != 1:
            return {"input": {}, "output": {}}
        runner = self._interpreter.get_signature_runner(keys[0])
        roles = {"input": runner.get_input_details(), "output": runner.get_output_details()}
        return {role: {name: one["name"] for name, one in found.items()} for role, found in roles.items()}

    def _refuse_what_goes_wrong(self):
        """Refuse what tflite-runtime, which is older, computes in silence as something else or dies of."""
        if NAME != "tflite-runtime":
            return
        then = "pip install ai-edge-litert on this device, or compile "
        for port in self._inputs.values():
            if port.dtype == "float16":
                raise ValueError(
                    "input %r is float16, which tflite-runtime %s does not compute with; %swith float32 inputs"
                    % (port.name, VERSION, then)
                )
        tensors = {one["index"]: one for one in self._interpreter.get_tensor_details()}
        for node in self._interpreter._get_ops_details():
            if node["op_name"] != "FULLY_CONNECTED":
                continue
            read, weights = (tensors[int(index)] for index in node["inputs"][:2])
            scales = len(weights["quantization_parameters"]["scales"])
            # Measured: version 2.14 uses one of the scales for all channels. Convolutions with such weights are right.
            if read["dtype"] == np.float32 and weights["dtype"] == np.int8 and scales > 1:
                raise ValueError(
                    "%r multiplies float activations by int8 weights with a scale for each channel, which "
                    "tflite-runtime %s computes wrongly; %sas fp32 or with int8 activations"
                    % (weights["name"], VERSION, then)
                )

    def boundary(self):
        moved = any(port.permutation for port in [*self._inputs.values(), *self._outputs.values()])
        return {
            # Inputs lie where the interpreter reads them, and it leaves them as they are; answers are fetched later.
            "includes_input_copy": False,
            "includes_output_copy": False,
            "threads": self._threads,
            "detail": "Interpreter.invoke, CPU, %s%s%s"
            % (
                "XNNPACK for %d of %d operators" % self.delegated()[:2] if self._uses_xnnpack else "no delegate",
                ", state set to zero inside" if self._has_state else "",
                ", axes permuted outside" if moved else "",
            ),
        }

    def bind(self, inputs):
        if set(inputs) != set(self._inputs):
            raise ValueError("the model takes the inputs %s, not %s" % (sorted(self._inputs), sorted(inputs)))
        arrays = {name: port.array(*inputs[name]) for name, port in self._inputs.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._shapes:
            self._allocate(shapes)
        for name, array in arrays.items():
            self._interpreter.set_tensor(self._inputs[name].index, array)
        self._has_answers = False

    def _allocate(self, shapes):
        self._shapes = None
        try:
            for name, shape in shapes.items():
                port = self._inputs[name]
                if -1 in port.shape:
                    self._interpreter.resize_tensor_input(port.index, list(shape), strict=True)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                "the artifact cannot take inputs of these shapes, %s (%s)"
                % (", ".join("%s %s" % (name, list(shape)) for name, shape in sorted(shapes.items())), told(error))
            ) from error
        self._shapes = shapes

    def infer(self):
        if self._shapes is None:
            raise RuntimeError("there are no inputs yet; bind them first")
        if self._has_state:
            self._interpreter.reset_all_variables()
        self._interpreter.invoke()
        self._has_answers = True

    def outputs(self):
        if not self._has_answers:
            raise RuntimeError("there are no answers yet; infer first")
        answers = {}
        for name, port in self._outputs.items():
            array = port.answer(self._interpreter.get_tensor(port.index))
            answers[name] = (array.tobytes(), array.dtype.name, list(array.shape))
        return answers

    def delegated(self):
        """Return (operators that a delegate computes, all operators, {kind: how many a delegate does not compute}).

        An operator that a delegate took over stays in the interpreter's list. It is found by walking from what the
        delegate makes back to what it reads: every operator on that way is inside it.
        """
        nodes = self._interpreter._get_ops_details()
        makers = {int(tensor): node for node in nodes if node["op_name"] != "DELEGATE" for tensor in node["outputs"]}
        inside = set()
        for delegate in nodes:
            if delegate["op_name"] != "DELEGATE":
                continue
            read = {int(tensor) for tensor in delegate["inputs"]}
            waiting = [int(tensor) for tensor in delegate["outputs"]]
            while waiting:
                node = makers.get(waiting.pop())
                if node is not None and node["index"] not in inside:
                    inside.add(node["index"])
                    waiting += [int(tensor) for tensor in node["inputs"] if int(tensor) not in read]
        outside = [node["op_name"] for node in nodes if node["op_name"] != "DELEGATE" and node["index"] not in inside]
        return len(inside), len(inside) + len(outside), dict(sorted(collections.Counter(outside).items()))

    def profile(self, runs=10):
        """Refuse: the interpreter's Python side gives no times of single operators."""
        raise NotImplementedError(
            "TFLite's Python interpreter says no times of single operators; use the C++ tool benchmark_model with "
            "--enable_op_profiling=true on the device"
        )


def told(error):
    """Return a foreign error's text in one line."""
    return " ".join(str(error).split())
