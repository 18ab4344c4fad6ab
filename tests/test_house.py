"""Holds the architecture up: layers, light imports, the runner's independence, and documents that match the code."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgedeploy.backends import session_file

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edgedeploy"
BACKENDS = sorted(path.parent for path in (PACKAGE / "backends").glob("*/__init__.py"))
SESSIONS = sorted({session_file(folder.name) for folder in BACKENDS})
DEVICE_FILES = [
    PACKAGE / "ondevice" / "runner.py",
    PACKAGE / "evidence" / "check.py",
    *SESSIONS,
    *PACKAGE.glob("backends/*/builder.py"),
]
HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxslim",
    "onnxscript",
    "numpy",
    "scipy",
    "paramiko",
    "labgrid",
    "grpc",
    "distributed",
    "jinja2",
    "safetensors",
    "sklearn",
    "torchao",
    "sqlalchemy",
    "alembic",
    "ruptures",
    "psycopg",
    "starlette",
    "uvicorn",
    "cryptography",
    "cyclonedx",
    "mlflow",
)
# What a back end's device half imports, where that is not called as the back end is.
RUNTIMES = {
    "mnn": ("MNN",),
    "tflite": ("ai_edge_litert", "tflite_runtime"),
    "trt_session": ("tensorrt", "tensorrt_rtx", "pycuda"),
}
VERBS = [
    "init",
    "doctor",
    "inspect",
    "compile",
    "sensitivity",
    "verify",
    "bench",
    "compare",
    "gate",
    "baseline",
    "run",
    "targets",
    "devices",
    "backends",
    "explain",
    "report",
    "history",
    "serve",
    "bundle",
    "install",
    "rollback",
    "reproduce",
    "export",
]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_every_backend_folder_has_both_halves():
    assert {folder.name for folder in BACKENDS} >= {"fake", "onnxruntime"}
    for folder in BACKENDS:
        assert session_file(folder.name).is_file(), f"{folder.name} has no device half"


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_runs_on_a_device_parses_as_python_3_8_and_imports_nothing_of_ours(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports mean a package, and there is none on the device"
            imported.add((node.module or "").partition(".")[0])
    assert "edgedeploy" not in imported
    allowed = set(sys.stdlib_module_names)
    if path in SESSIONS:
        name = path.parent.name if path.name == "session.py" else path.stem
        allowed |= {"numpy", *RUNTIMES.get(name, (name,))}
    elif path.name == "builder.py":
        allowed |= {"numpy", path.parent.name}
    assert imported <= allowed


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_and_import_load_no_heavy_library(arguments):
    code = (
        f"import sys, edgedeploy.cli\n"
        f"assert edgedeploy.cli.run({arguments!r}) == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_and_json(verb):
    import click

    import edgedeploy.cli

    command = edgedeploy.cli.cli.get_command(click.Context(edgedeploy.cli.cli), verb)
    leaves = list(command.commands.values()) if isinstance(command, click.Group) else [command]
    for leaf in leaves:
        assert leaf.help, f"{verb} {leaf.name} has no help"
        assert "edgedeploy" in (leaf.epilog or ""), f"{verb} {leaf.name} has no example"
        assert any("--json" in option.opts for option in leaf.params), f"{verb} {leaf.name} has no --json"


def test_public_verbs_are_those_that_exist():
    import edgedeploy

    assert sorted(edgedeploy.__all__) == sorted(name for name in edgedeploy.__all__ if hasattr(edgedeploy, name))
    assert {"compile", "bench", "compare", "gate", "run"} <= set(edgedeploy.__all__)
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(edgedeploy.__all__), "a module of a verb's name would replace the verb"


def test_architecture_page_shows_the_real_tree():
    page = (PACKAGE / "ARCHITECTURE.md").read_text()
    block = page.split("```tree\n")[1].split("```")[0]
    shown: set[str] = set()
    folders: list[str] = []
    for line in block.splitlines():
        match = re.match(r"^(?P<indent>(?: {4})*)(?P<name>[\w./-]+)", line)
        assert match, f"not a line of the tree: {line!r}"
        depth = len(match["indent"]) // 4
        folders = folders[:depth]
        shown.add("/".join([*folders, match["name"].rstrip("/")]))
        if match["name"].endswith("/"):
            folders.append(match["name"].rstrip("/"))
    real = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "__pycache__" not in path.parts and path.name != "__init__.py"
    }
    real |= {str(parent) for path in real for parent in Path(path).parents if parent.name}
    assert shown == real


def test_every_environment_variable_is_documented():
    used = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r"EDGEDEPLOY_[A-Z_]+\b", path.read_text())
        if not name.endswith("_")
    }
    readme = (ROOT / "README.md").read_text()
    assert used, "the search itself broke"
    assert [name for name in sorted(used) if name not in readme] == []


def test_every_verb_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [verb for verb in VERBS if f"edgedeploy {verb}" not in readme] == []


def test_constraints_pin_every_direct_dependency_exactly():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["torch"], *extras["onnxruntime"], *extras["ssh"], *extras["dev"]]
    names = {re.split(r"[<>=\[ ]", one)[0].lower() for one in wanted}
    assert names <= pinned


def test_user_mistake_is_a_sentence_and_json_when_asked():
    done = subprocess.run(
        [sys.executable, "-m", "edgedeploy", "compile", "nothing.onnx", "-o", "x", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "EDGEDEPLOY_LOG": "warning"},
        check=False,
    )
    assert done.returncode in (2, 3)
    assert "Traceback" not in done.stderr
    document = json.loads(done.stdout)
    assert document["format"] == "edgedeploy.error/1"
    assert document["exit_code"] == done.returncode


def test_reader_that_leaves_early_is_not_complained_of():
    command = [sys.executable, "-c", "from edgedeploy.cli import main; main()", "doctor", "--security"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
