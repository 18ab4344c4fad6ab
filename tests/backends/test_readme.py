"""What a newcomer types from the README works, in the order in which it stands there."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgedeploy.cli
from edgedeploy import measure
from edgedeploy.judge import gate
from edgedeploy.storage import sha256_file

pytest.importorskip("torch", reason="the README compiles from PyTorch: pip install 'edgedeploy[torch]'")
pytest.importorskip("onnxruntime", reason="the README runs ONNX Runtime: pip install 'edgedeploy[onnxruntime]'")

ROOT = Path(__file__).parent.parent.parent
# Which verdict a gate gives depends on how quiet this machine is; that it gives one does not.
VERDICT_CODES = (0, 1, 4)


def _commands() -> list[list[str]]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line) for line in lines]


def _short(words: list[str]) -> list[str]:
    """Return what keeps a command that measures short."""
    if words[1] == "bench":
        return ["--visits", "2"]
    if words[1] == "bundle" and "--sign" in words:  # which verdict `run` came to depends on how quiet this machine is
        return ["--allow-decision", "INCONCLUSIVE", "--allow-decision", "FAIL"]
    return ["--max-blocks", "2"] if words[1] in ("gate", "compare") else []


@pytest.mark.timeout(600)
def test_readme_commands_run_in_order(tmp_path, monkeypatch, capsys):
    (tmp_path / "calibration").symlink_to(ROOT / "calibration")
    _with_fewer_samples(ROOT / "edgedeploy", tmp_path / "edgedeploy", 250)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    usual = measure._usual_schedule
    monkeypatch.setattr(measure, "_usual_schedule", lambda sides: replace(usual(sides), warm_up_cap_s=0.2))
    monkeypatch.setattr(measure, "MEMORY_VISITS", 1)
    monkeypatch.setattr(gate, "is_decided", lambda baseline, candidate, *policy, **more: len(baseline.visits) >= 2)
    ran = []
    for words in _commands():
        if words[0] == "pip":
            continue
        assert words[0] == "edgedeploy"
        if words[1] == "run":  # what `init` wrote names model.onnx, which a person has by now
            shutil.copy(_an_onnx_file(tmp_path), tmp_path / "model.onnx")
        code = edgedeploy.cli.run([*words[1:], *_short(words)])
        told = capsys.readouterr()
        judges = words[1] in ("gate", "run") or "--compare-precisions" in words
        assert code in (VERDICT_CODES if judges else (0,)), (words, told.err)
        ran.append(words[1])
    assert {"init", "run", "compile", "bench", "compare", "gate", "doctor"} <= set(ran)


def _with_fewer_samples(package: Path, copy: Path, count: int) -> None:
    """Make a copy of the package, of links, in which the evaluation set of the quickstart has only its first samples."""
    demo, evaluation = package / "demo", package / "demo" / "evaluation"
    fewer = copy / "demo" / "evaluation"
    fewer.mkdir(parents=True)
    for path in [*package.iterdir(), *demo.iterdir()]:
        if path not in (demo, evaluation):
            (copy / path.relative_to(package)).symlink_to(path)
    with np.load(evaluation / "samples.npz") as samples:
        np.savez(fewer / "samples.npz", **{name: samples[name][:count] for name in samples.files})
    manifest = re.sub(r"(?m)^count = \d+$", f"count = {count}", (evaluation / "manifest.toml").read_text())
    digest = sha256_file(fewer / "samples.npz")
    (fewer / "manifest.toml").write_text(re.sub(r'(?m)^sha256 = "\w+"$', f'sha256 = "{digest}"', manifest))


def _an_onnx_file(folder: Path) -> Path:
    import onnx

    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 8]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "tiny", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "tiny.onnx")
    return folder / "tiny.onnx"


def test_readme_python_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    _an_onnx_file(tmp_path).rename(tmp_path / "model.onnx")
    exec(compile(example, "README.md", "exec"), {})
    assert "model.onnx" in capsys.readouterr().out


def test_readme_lab_example_is_a_lab(tmp_path):
    from edgedeploy.lab.inventory import load_lab

    text = (ROOT / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL) if "lab/1" in block]
    (tmp_path / "lab.toml").write_text(example)
    assert load_lab(tmp_path / "lab.toml").devices["pi-desk"].user == "pi"


def test_readme_declaration_is_one():
    import tomllib

    import msgspec

    from edgedeploy.records.release import Declared

    text = (ROOT / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL) if "declared" in block]
    declared = msgspec.convert(tomllib.loads(example)["models"]["student"]["declared"], Declared)
    assert declared.qat is True
    assert declared.sparsity == 0.5


def test_readme_names_every_setting_of_quantization():
    from edgedeploy.records.quantization import QuantizationPolicy

    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}" in text for name in QuantizationPolicy.__struct_fields__)
