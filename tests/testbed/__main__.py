"""python -m tests.testbed build | up | down | status | clean | identity: devices for tests, for a person to play with."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import lab
from .cache import TestbedError
from .identity import MODELS, Identity


def main(arguments: list[str]) -> int:
    """Do what the command line says and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.testbed", description=__doc__)
    parser.add_argument("command", choices=["build", "up", "down", "status", "clean", "identity", "serve"])
    parser.add_argument(
        "word", nargs="*", help="plain, hybrid, vm (all where none is named); of identity: pi4 | orin FOLDER"
    )
    parsed = parser.parse_args(arguments)
    tiers = parsed.word or list(lab.TIERS)
    if parsed.command == "identity":
        if len(tiers) != 2 or tiers[0] not in MODELS or Path(tiers[1]).exists():
            parser.error("identity takes pi4 or orin and a folder that does not exist yet")
        Identity("pi4" if tiers[0] == "pi4" else "orin", Path(tiers[1]))
        return 0
    if unknown := [tier for tier in tiers if tier not in lab.TIERS]:
        parser.error(f"there is no tier {unknown[0]!r}; there are {', '.join(lab.TIERS)}")
    started_s = time.monotonic()
    try:
        if parsed.command == "build":
            lab.build(tiers)
            print(f"{', '.join(tiers)} can be started ({time.monotonic() - started_s:.1f} s)")
        elif parsed.command == "up":
            path = lab.up(tiers)
            edgedeploy = Path(sys.executable).with_name("edgedeploy")
            print(
                f"the lab is up ({time.monotonic() - started_s:.1f} s): {path}\nnext: {edgedeploy} devices list --lab {path}"
            )
        elif parsed.command == "down":
            print("the lab is down" if lab.down() else "there was no lab")
        elif parsed.command == "status":
            print(lab.as_json(lab.status()))
        elif parsed.command == "clean":
            lab.clean()
        else:
            lab.serve(tiers)
    except TestbedError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 3
    return 0


sys.exit(main(sys.argv[1:]))
