"""A device's /proc and /sys as a folder of small files, and what the runner reads of them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgedeploy.ondevice import runner
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.run import Conditions


def tree(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def facts(root: str) -> DeviceFacts:
    return msgspec.convert(runner.read_facts(root), DeviceFacts)


def conditions(root: str, tools: dict[str, str] | None = None) -> Conditions:
    return msgspec.convert(runner.read_conditions(root, tools), Conditions)
