"""Every name that our device halves use of TensorRT exists in every version, or is asked for before it is used.

The names are those that were recorded from the real modules; with EDGEDEPLOY_TEST_TENSORRT_WHEELS (a folder with wheels of
tensorrt-cu12-bindings or tensorrt-cu13-bindings for this Python) the real modules are imported and compared with them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgedeploy import backends

FOLDER = Path(backends.__file__).parent
RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_api_names.json").read_text())
# RTX is another product with the same API; the builder never meets it, the session does.
VERSIONS = tuple(version for version in RECORDED if not version.startswith("rtx"))
SOURCES = {FOLDER / "tensorrt" / "builder.py": VERSIONS, FOLDER / "trt_session.py": tuple(RECORDED)}
MODULE = "tensorrt"

# What a variable or attribute of this name holds, where its value does not say so.
HOLDS = {
    "trt": MODULE, "builder": "Builder", "network": "INetworkDefinition", "config": "IBuilderConfig",
    "parser": "OnnxParser", "profile": "IOptimizationProfile", "runtime": "Runtime", "loader": "Runtime",
    "engine": "ICudaEngine", "context": "IExecutionContext", "inspector": "EngineInspector", "refitter": "Refitter",
    "layer": "ILayer", "cache": "ITimingCache", "problem": "ParserError",
}  # fmt: skip
# What a method returns.
RETURNS = {
    ("Builder", "create_network"): "INetworkDefinition", ("Builder", "create_builder_config"): "IBuilderConfig",
    ("Builder", "create_optimization_profile"): "IOptimizationProfile", ("INetworkDefinition", "get_input"): "ITensor",
    ("INetworkDefinition", "get_output"): "ITensor", ("INetworkDefinition", "get_layer"): "ILayer",
    ("ILayer", "get_output"): "ITensor", ("OnnxParser", "get_error"): "ParserError",
    ("IBuilderConfig", "create_timing_cache"): "ITimingCache", ("IBuilderConfig", "get_timing_cache"): "ITimingCache",
    ("Runtime", "deserialize_cuda_engine"): "ICudaEngine",
    ("ICudaEngine", "create_execution_context"): "IExecutionContext",
    ("ICudaEngine", "create_engine_inspector"): "EngineInspector",
    ("ICudaEngine", "create_runtime_config"): "IRuntimeConfig",
}  # fmt: skip
# Entered for weakly typed networks only: what it uses must be wherever those are.
WEAK_ONLY = {"keep_float32"}
# Classes of the session that speak with CUDA alone: what they call runtime and context is not TensorRT's.
CUDA_ONLY = {"CudaRuntime", "CudartBuffers", "PycudaBuffers"}
# A plan's bytes, which are read as a buffer.
UNCHECKED = {"IHostMemory"}


# (kind, name, whether it is there): what a version must be like for the program to get somewhere.
Condition = tuple[str, str, bool]


@dataclass(frozen=True)
class Use:
    """One name that is used of an object of TensorRT's, and the conditions under which the program gets there."""

    kind: str
    name: str
    line: int
    function: str
    conditions: frozenset[Condition]


class Scan(ast.NodeVisitor):
    """Finds what a source uses of TensorRT's module, classes and enumerations."""

    def __init__(self, tree: ast.AST) -> None:
        self.uses: list[Use] = []
        self.asked: list[tuple[str, str, int]] = []
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.variables: list[dict[str, str]] = [{}]
        self.functions: list[str] = []
        # Facts that are kept: self._has_graphs = hasattr(...).
        self.facts = {
            part.targets[0].attr: part.value
            for part in ast.walk(tree)
            if isinstance(part, ast.Assign)
            and isinstance(part.targets[0], ast.Attribute)
            and isinstance(part.value, ast.Call)
        }
        self.visit(tree)

    def kind_of(self, node: ast.AST | None) -> str | None:
        """Return what an expression holds: the module, "enum X", "class X" or the X of an object; None: none of these."""
        if isinstance(node, ast.Name):
            for scope in reversed(self.variables):
                if node.id in scope:
                    return scope[node.id] or None
            return HOLDS.get(node.id.strip("_"))
        if isinstance(node, ast.Attribute):
            owner = self.kind_of(node.value)
            if owner == MODULE:
                return self.kind_in_module(node.name if isinstance(node, ast.alias) else node.attr)
            return HOLDS.get(node.attr.strip("_")) if isinstance(node.value, ast.Name) and owner is None else None
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                owner = self.kind_of(function.value)
                if owner == MODULE:
                    made = self.kind_in_module(function.attr) or ""
                    return made.removeprefix("class ") if made.startswith("class ") else None
                return RETURNS.get((owner or "", function.attr))
        return None

    def kind_in_module(self, name: str) -> str | None:
        if any(name in api["enums"] for api in RECORDED.values()):
            return f"enum {name}"
        return f"class {name}" if any(name in api["classes"] for api in RECORDED.values()) else None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if node.name not in CUDA_ONLY:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.variables.append({})
        self.functions.append(node.name)
        for statement in ast.walk(node):
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target = statement.targets[0]
                if isinstance(target, ast.Name) and (found := self.kind_of(statement.value)):
                    self.variables[-1][target.id] = found
            elif isinstance(statement, ast.comprehension | ast.For) and isinstance(statement.target, ast.Name):
                # What is iterated over is ours, whatever it is called, but for lists of TensorRT's own objects.
                name = statement.target.id
                self.variables[-1].update({name: ""} if name != "problem" and name in HOLDS else {})
        self.generic_visit(node)
        self.functions.pop()
        self.variables.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        kind = self.kind_of(node.value)
        if kind is not None and not node.attr.startswith("__"):
            self.use(kind, node.attr, node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            kind, name = self.kind_of(node.args[0]), node.args[1]
            if kind is not None and isinstance(name, ast.Constant):
                self.asked.append((kind, str(name.value), node.lineno))
                if node.func.id == "getattr" and len(node.args) == 2:
                    self.use(kind, str(name.value), node)
        is_flag = isinstance(node.func, ast.Attribute) and node.func.attr == "flag" and len(node.args) > 1
        if is_flag and isinstance(node.args[1], ast.Constant):
            self.asked.append(("enum BuilderFlag", str(node.args[1].value), node.lineno))
        self.generic_visit(node)

    def use(self, kind: str, name: str, node: ast.expr) -> None:
        function = self.functions[-1] if self.functions else ""
        self.uses.append(Use(kind, name, node.lineno, function, frozenset(self.conditions(node))))

    def conditions(self, node: ast.AST) -> Iterator[Condition]:
        """Yield what was tested on the way to a node."""
        child, parent = node, self.parents.get(node)
        while parent is not None:
            if isinstance(parent, ast.If | ast.IfExp) and child is not parent.test:
                is_body = child in parent.body if isinstance(parent, ast.If) else child is parent.body
                yield from self.told(parent.test, is_true=is_body)
            if isinstance(parent, ast.BoolOp):
                for value in parent.values[: parent.values.index(child)]:  # type: ignore[arg-type]
                    yield from self.told(value, is_true=isinstance(parent.op, ast.And))
            for block in ("body", "orelse", "finalbody"):
                statements = getattr(parent, block, [])
                if isinstance(statements, list) and child in statements:
                    for earlier in statements[: statements.index(child)]:
                        leaves = ast.Return | ast.Raise | ast.Continue
                        if isinstance(earlier, ast.If) and isinstance(earlier.body[-1], leaves):
                            yield from self.told(earlier.test, is_true=False)
            child, parent = parent, self.parents.get(parent)

    def told(self, test: ast.AST, *, is_true: bool) -> Iterator[Condition]:
        """Yield what is known of a version where a test came out as told."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yield from self.told(test.operand, is_true=not is_true)
        elif isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) is is_true:
            for value in test.values:
                yield from self.told(value, is_true=is_true)
        elif isinstance(test, ast.Name) and (value := self.assigned(test)):
            yield from self.told(value, is_true=is_true)
        elif isinstance(test, ast.Attribute) and test.attr in self.facts:
            yield from self.told(self.facts[test.attr], is_true=is_true)
        elif isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "hasattr":
            kind, name = self.kind_of(test.args[0]), test.args[1]
            if kind is not None and isinstance(name, ast.Constant):
                yield kind, str(name.value), is_true

    def assigned(self, name: ast.Name) -> ast.AST | None:
        """Return what a variable was given, where it is given something once, by the function that it is in."""
        node: ast.AST | None = name
        while node is not None and not isinstance(node, ast.FunctionDef):
            node = self.parents.get(node)
        values = [
            part.value
            for part in ast.walk(node or name)
            if isinstance(part, ast.Assign)
            and any(isinstance(one, ast.Name) and one.id == name.id for one in part.targets)
        ]
        return values[0] if len(values) == 1 else None


def exists(version: str, kind: str, name: str) -> bool:
    api = RECORDED[version]
    if kind == MODULE:
        return name in api["names"] or name in api["classes"] or name in api["enums"] or name == "__version__"
    # Of what a version does not have nothing can be used: whoever got there was stopped by its name.
    if kind.startswith("enum "):
        return name in api["enums"].get(kind[5:], (name,))
    kind = kind.removeprefix("class ")
    return kind in UNCHECKED or kind not in api["classes"] or name in api["classes"][kind]


def faults(source: str, versions: tuple[str, ...] = VERSIONS) -> list[str]:
    """Return what a source uses without asking, and what it asks for that no version has."""
    scan = Scan(ast.parse(source))
    found = []
    for use in scan.uses:
        wanted = [version for version in versions if use.function not in WEAK_ONLY or is_weak(version)]
        wanted = [version for version in wanted if all(holds(version, *condition) for condition in use.conditions)]
        missing = [version for version in wanted if not exists(version, use.kind, use.name)]
        if missing:
            found.append(f"line {use.line}: {use.kind}.{use.name} is not in {', '.join(missing)}, and nobody asked")
    for kind, name, line in scan.asked:
        if not any(exists(version, kind, name) for version in versions if kind_exists(version, kind)):
            found.append(f"line {line}: {kind}.{name} is asked for, and no version has it")
    return found


def holds(version: str, kind: str, name: str, is_there: bool) -> bool:
    return (kind_exists(version, kind) and exists(version, kind, name)) is is_there


def is_weak(version: str) -> bool:
    return "FP16" in RECORDED[version]["enums"]["BuilderFlag"]


def kind_exists(version: str, kind: str) -> bool:
    word = kind.rpartition(" ")[-1]
    return kind == MODULE or word in RECORDED[version]["classes"] or word in RECORDED[version]["enums"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_name_that_is_used_exists_or_was_asked_for(path):
    assert faults(path.read_text(), SOURCES[path]) == []


def test_scan_sees_what_the_builder_uses():
    uses = {(use.kind, use.name) for use in Scan(ast.parse((FOLDER / "tensorrt" / "builder.py").read_text())).uses}
    for wanted in (
        ("tensorrt", "Builder"), ("Builder", "build_serialized_network"), ("IBuilderConfig", "set_memory_pool_limit"),
        ("enum BuilderFlag", "TF32"), ("ILayer", "precision"), ("ITensor", "shape"), ("ICudaEngine", "num_io_tensors"),
        ("class ILogger", "WARNING"), ("ParserError", "desc"), ("ITimingCache", "serialize"), ("Refitter", "refit_cuda_engine"),
        ("EngineInspector", "get_engine_information"), ("IOptimizationProfile", "set_shape"),
    ):  # fmt: skip
        assert wanted in uses


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("def f(trt): return trt.IProgressMonitor()", "tensorrt.IProgressMonitor is not in"),
        ("def f(trt): return trt.BuilderFlag.FP16", "enum BuilderFlag.FP16 is not in 11.4.0.106"),
        ("def f(trt):\n kinds = trt.BuilderFlag\n return kinds.INT8", "enum BuilderFlag.INT8"),
        ("def f(builder): return builder.max_batch_size", "Builder.max_batch_size"),
        ("def f(engine): return engine.num_bindings", "ICudaEngine.num_bindings"),
        ("def f(self): return self._engine.num_bindings", "ICudaEngine.num_bindings"),
        (
            "def f(trt, l):\n b = trt.Builder(l)\n n = b.create_network(0)\n return n.get_layer(0).precision",
            "ILayer.precision",
        ),
        ("def f(engine):\n if hasattr(engine, 'num_bindings'): pass\n return engine.num_bindings", "nobody asked"),
        ("def f(engine):\n if not hasattr(engine, 'num_bindings'): return engine.num_bindings", "nobody asked"),
        ("def f(engine): return hasattr(engine, 'num_bindings') or engine.num_bindings", "nobody asked"),
        ("def f(engine): return engine.num_bindings if hasattr(engine, 'num_layers') else 0", "nobody asked"),
        ("def f(config): return hasattr(config, 'progres_monitor')", "no version has it"),
        ("def f(self, config): self.flag(config, 'FP17', '')", "no version has it"),
        ("def f(trt): return getattr(trt, 'IProgressMonitor')", "nobody asked"),
    ],
)
def test_scan_finds_what_is_planted(source, word):
    (found,) = faults(source)
    assert word in found


@pytest.mark.parametrize(
    "source",
    [
        "def f(engine): return engine.num_bindings if hasattr(engine, 'num_bindings') else engine.num_io_tensors",
        "def f(engine):\n if not hasattr(engine, 'num_bindings'):\n  return 0\n return engine.num_bindings",
        "def f(trt, more): return hasattr(trt, 'IProgressMonitor') and more and trt.IProgressMonitor()",
        "def f(trt): return getattr(trt.BuilderFlag, 'FP16', None)",
        "def f(engine): return not hasattr(engine, 'num_bindings') or engine.num_bindings",
    ],
)
def test_scan_accepts_what_was_asked_for(source):
    assert faults(source) == []


def test_no_number_stands_for_an_enumeration():
    """Enumerations move between versions: 1 << 0 is EXPLICIT_BATCH up to 10 and STRONGLY_TYPED in 11."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            takes_flags = ("set_flag", "clear_flag", "create_network")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in takes_flags:
                parts = [part for argument in node.args for part in ast.walk(argument)]
                assert not any(isinstance(part, ast.Constant) for part in parts)


def test_versions_are_compared_by_what_they_have():
    source = (FOLDER / "tensorrt" / "builder.py").read_text()
    assert "__version__" in source
    assert not re.search(
        r"__version__\s*(<|>|\.split|\.startswith|==)|version\.split|parse_version|LooseVersion", source
    )


# ------------------------------------------------------------------------------------------------ the real modules

WHEELS = os.environ.get("EDGEDEPLOY_TEST_TENSORRT_WHEELS", "")
# What the bindings of 10.3, 10.13.3, 10.16.1 and 11.4 expect of NVIDIA's libraries (nm -D); importing calls none of them.
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
LOOK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings as module
wanted = json.load(sys.stdin)
missing = []
for kind, name in wanted:
    words = kind.split(" ")
    owner = module if kind == "tensorrt" else getattr(module, words[-1], None)
    if owner is None or not hasattr(owner, name):
        missing.append([kind, name])
json.dump({"version": module.__version__, "missing": missing}, sys.stdout)
"""


def unpack_with_stubs(wheel: Path, folder: Path) -> None:
    """Unpack a wheel of bindings, and compile empty libraries for it beside it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "empty.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    major = wheel.name.split("-")[1].split(".")[0]
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        library = folder / f"lib{name}.so.{major}"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(folder / "empty.c")],
            check=True,
        )


@pytest.mark.skipif(
    not WHEELS,
    reason="needs wheels of NVIDIA's bindings: pip download --no-deps tensorrt-cu12-bindings==10.3.0 -d DIR; "
    "EDGEDEPLOY_TEST_TENSORRT_WHEELS=DIR",
)
def test_real_modules_have_what_was_recorded_of_them(tmp_path):
    wheels = sorted(Path(WHEELS).glob("tensorrt_*bindings*.whl"))
    assert wheels, f"{WHEELS} holds no wheel of bindings"
    uses = sorted({(use.kind, use.name) for path in SOURCES for use in Scan(ast.parse(path.read_text())).uses})
    for number, wheel in enumerate(wheels):
        version = wheel.name.split("-")[1].removesuffix(".post1")
        (key,) = [key for key in VERSIONS if key.startswith(version) or version.startswith(key)]
        site = tmp_path / str(number)
        unpack_with_stubs(wheel, site)
        done = subprocess.run(
            [sys.executable, "-c", LOOK, str(site)], input=json.dumps(uses), capture_output=True, text=True,
            check=False, env={**os.environ, "LD_LIBRARY_PATH": str(site)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        recorded = [[kind, name] for kind, name in uses if not (kind_exists(key, kind) and exists(key, kind, name))]
        assert (told["version"], told["missing"]) == (version, recorded)
