"""Tool environments: made once from wheels of a folder, shared by processes, remade when broken, refused in sentences."""

import subprocess
import sys
import zipfile

import pytest

from edgedeploy.backends.toolenv import ToolEnvironment
from edgedeploy.errors import InternalError, ToolchainError

NAME = "edgedeploy_probe_of_a_test"


def wheel(folder, version="1.0"):
    """Write a pure wheel by hand (PyPA binary distribution format): one module, metadata, a list of files."""
    folder.mkdir(exist_ok=True)
    info = f"{NAME}-{version}.dist-info"
    files = {
        f"{NAME}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version}\nRequires-Python: >=3.99\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{NAME}-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return folder


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEDEPLOY_TOOLS_DIR", str(tmp_path / "tools"))
    monkeypatch.setenv("EDGEDEPLOY_WHEELHOUSE", str(wheel(tmp_path / "wheels")))
    return tmp_path


def tools(folder, pins=f"{NAME}==1.0\n", modules=(NAME,)):
    (folder / "requirements.txt").write_text(pins)
    return ToolEnvironment("probe", folder / "requirements.txt", modules)


def version_in(python):
    code = f"import {NAME}; print({NAME}.VERSION)"
    return subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An environment that was made once, with what was said meanwhile."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEDEPLOY_TOOLS_DIR", str(folder / "tools"))
        patch.setenv("EDGEDEPLOY_WHEELHOUSE", str(wheel(folder / "wheels")))
        said = []
        environment = tools(folder)
        python = environment.python(said.append)
        yield environment, python, said


def test_an_environment_is_made_from_a_folder_of_wheels_without_a_network(made):
    environment, python, _ = made
    assert version_in(python) == "1.0"
    assert environment.versions() == {NAME: "1.0"}
    assert environment.missing() is None


def test_progress_says_what_is_done_and_for_how_long(made):
    _, _, said = made
    assert any("making the converter's environment, once" in line for line in said)
    assert any("installing its packages, 0 s" in line for line in said)


def test_a_second_use_makes_nothing(made):
    environment, python, _ = made
    before = python.stat().st_ctime_ns
    said = []
    assert environment.python(said.append) == python
    assert (said, python.stat().st_ctime_ns) == ([], before)


def test_two_processes_at_once_make_one_environment(offline):
    environment = tools(offline)
    code = (
        "import sys; from pathlib import Path; from edgedeploy.backends.toolenv import ToolEnvironment\n"
        f"print(ToolEnvironment('probe', Path({str(environment.requirements)!r}), ({NAME!r},)).python(print))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert sum("once, in" in text for text in texts) == 1
    assert version_in(texts[0].splitlines()[-1]) == "1.0"


def test_what_an_interrupted_making_left_is_made_anew(offline):
    environment = tools(offline)
    folder = environment.folder()
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text("half a file")
    (folder / "rest").write_text("of an earlier one")
    assert version_in(environment.python()) == "1.0"
    assert not (folder / "rest").exists()


def test_other_pins_are_another_environment(offline):
    old = tools(offline).folder()
    assert tools(offline, f"{NAME}==2.0\n").folder() != old


def test_a_package_that_no_folder_has_is_a_sentence_with_the_way_out(offline):
    environment = tools(offline, f"{NAME}==9.9\n")
    with pytest.raises(ToolchainError) as error:
        environment.python()
    text = str(error.value)
    assert f"{NAME}==9.9" in text  # pip's own words
    assert "pip download" in text
    assert "EDGEDEPLOY_WHEELHOUSE=wheels" in text
    assert environment.missing() is None  # it can be tried again


def test_a_wheelhouse_that_is_no_folder_is_refused(offline, monkeypatch):
    monkeypatch.setenv("EDGEDEPLOY_WHEELHOUSE", str(offline / "nowhere"))
    with pytest.raises(ToolchainError, match="nowhere, which is no folder"):
        tools(offline).python()


def test_a_folder_that_cannot_be_written_is_a_sentence(offline, monkeypatch):
    (offline / "file").write_text("")
    monkeypatch.setenv("EDGEDEPLOY_TOOLS_DIR", str(offline / "file"))
    with pytest.raises(ToolchainError, match=r"could not be written to .*EDGEDEPLOY_TOOLS_DIR"):
        tools(offline).python()


def test_an_interpreter_that_has_the_modules_needs_no_environment(offline):
    environment = tools(offline, "pytest==0.0.1\nno-such-distribution==1\n", modules=("pytest",))
    assert environment.python() == type(offline)(sys.executable)
    assert environment.versions() == {"pytest": pytest.__version__, "no-such-distribution": "not installed"}
    assert not (offline / "tools").exists()


def test_a_python_without_venv_says_what_to_install(offline, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("ensurepip", "pip") else real(name))
    with pytest.raises(ToolchainError, match=r"module ensurepip; install it \(on Debian: apt install python3-venv\)"):
        tools(offline).python()


def test_an_interpreter_without_pip_of_its_own_unpacks_one_there(offline, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    python = tools(offline).python()
    assert version_in(python) == "1.0"
    assert subprocess.run([python, "-I", "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def test_a_requirement_without_an_exact_version_is_our_mistake(offline):
    with pytest.raises(InternalError, match='line 2: "numpy>=2" pins no exact version'):
        tools(offline, f"{NAME}==1.0\nnumpy>=2\n").versions()


def test_shipped_requirements_pin_everything():
    from edgedeploy.backends.tflite import TOOLS

    pins = TOOLS._pins()
    assert pins["onnx2tf"] == "2.6.9"
    assert not {"tensorflow", "torch"} & {name.lower() for name in pins}
