"""From nothing to a number on a bare aarch64 board: added, provisioned with real wheels, measured; seconds are told."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgedeploy import boards, cli
from edgedeploy.lab import bundle, provision
from edgedeploy.lab.inventory import load_lab, open_transport
from tests.testbed.cache import cache
from tests.testbed.hybrid import Hybrid

LINEAR = 64


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a folder to work in; what was fetched and packed is kept with the devices, for the next time."""
    folder = tmp_path_factory.mktemp("provision")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        patch.delenv("EDGEDEPLOY_LAB", raising=False)
        patch.setenv("EDGEDEPLOY_CACHE_DIR", str(cache() / "host"))
        patch.setenv("EDGEDEPLOY_RESULTS", str(folder / "results"))
        yield folder


@pytest.fixture(scope="module")
def lab(place: Path, hybrid: Hybrid) -> Iterator[Path]:
    """Give a lab file with the board as `devices add` writes it; what is provisioned is removed at the end."""
    shown = subprocess.run(
        ["ssh-keygen", "-lf", "-"], input=hybrid.known_hosts.read_bytes(), stdout=subprocess.PIPE, check=True
    ).stdout.split()[1]
    path = place / "lab.toml"
    words = ["devices", "add", "bare", f"{hybrid.user}@{hybrid.host}:{hybrid.port}", "--key", str(hybrid.key)]
    with timed("devices add"):
        assert cli.run([*words, "--fingerprint", shown.decode(), "--lab", str(path), "--json"]) == 0
    yield path
    entry = load_lab(path).devices["bare"]
    with open_transport("bare", entry) as transport, bundle.connect(transport, entry, device_name="bare") as agent:
        provision.remove(agent, [one.name for one in provision.installed(agent)])


SECONDS: dict[str, float] = {}


@contextmanager
def timed(what: str) -> Iterator[None]:
    started_s = time.monotonic()
    yield
    SECONDS[what] = time.monotonic() - started_s


def a_model(path: Path) -> None:
    import numpy as np
    import onnx

    helper = onnx.helper
    weights = np.random.default_rng(0).normal(size=(LINEAR, LINEAR)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", LINEAR])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", LINEAR])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def test_from_nothing_to_a_number(
    place: Path,
    lab: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    pytest.importorskip("onnxruntime", reason="compiling needs it: pip install 'edgedeploy[onnxruntime]'")
    device = load_lab(lab).devices["bare"]
    assert device.target == "raspberry-pi-4"
    a_model(place / "small.onnx")
    with timed("compile"):
        assert cli.run(["compile", "small.onnx", "--target", device.target, "-o", "built", "--name", "small"]) == 0
    bench = ["bench", "built", "--device", "bare", "--lab", str(lab), "--visits", "1", "--json"]
    capsys.readouterr()
    assert cli.run(bench) == 3
    assert "edgedeploy devices provision bare --runtime onnxruntime" in "".join(capsys.readouterr())
    with timed("devices provision"):
        assert cli.run(["devices", "provision", "bare", "--runtime", "onnxruntime", "--lab", str(lab)]) == 0
    capsys.readouterr()
    with timed("bench"):
        assert cli.run(bench) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["runtime"].startswith("onnxruntime ")
    assert run["facts"]["machine"] == "aarch64"
    assert run["facts"]["interpreter"]["tag"].startswith("cp3")
    assert run["golden"] is not None
    assert all(sample_s > 0 for visit in run["visits"] for burst in visit["bursts"] for sample_s in burst["samples_s"])
    with timed("devices provision, nothing missing"):
        (provided,) = boards.provision_device("bare", lab, ["onnxruntime"], lambda text: None).provided
    assert not provided.was_missing
    for what, seconds in SECONDS.items():
        record_property(what, f"{seconds:.1f} s")
    with capsys.disabled():
        print(f"\n  from nothing to a number: {', '.join(f'{what} {s:.1f} s' for what, s in SECONDS.items())}")


@pytest.mark.long
@pytest.mark.parametrize("runtime", ["onnxruntime", "ai-edge-litert", "tflite-runtime", "mnn"])
def test_every_runtime_is_fetched_packed_and_imported_there(lab: Path, hybrid: Hybrid, runtime: str) -> None:
    done = boards.provision_device("bare", lab, [runtime], lambda text: None)
    (one,) = done.provided
    assert one.runtime.distribution == runtime
    assert one.runtime.name in {found.name for found in done.installed}
    assert one.runtime.size_bytes < 120 << 20
    packages = hybrid.ssh("ls", f".cache/edgedeploy/runtimes/{one.runtime.name}").split()
    assert "numpy" in packages
    assert not {"protobuf", "google", "sympy", "packaging", "_tools"} & set(packages)
