"""bench_results/: runs are appended and never edited; a baseline is a small pointer whose change can be reviewed."""

from __future__ import annotations

import getpass
import re
import urllib.parse
from datetime import UTC, datetime
from pathlib import Path

from edgedeploy.documents import closest, encode_json, read_json, write_json
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.records.run import BASELINE_FORMAT, FORMAT, Baseline, Run
from edgedeploy.storage import sha256_bytes, sha256_file, write_atomic


def utc_now() -> str:
    """Return the current time as 2026-11-22T06:30:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Results:
    """The results folder.

    Args:
        root: usually ./bench_results.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def save_run(self, run: Run) -> Path:
        """Append a run as runs/<target>/<model>/<UTC time>-<digest8>.json."""
        data = encode_json(run)
        time = re.sub(r"[^0-9TZ]", "", run.started_utc)
        folder = self.root / "runs" / _as_name(run.artifact.target) / _as_name(run.artifact.model)
        path = folder / f"{time}-{sha256_bytes(data)[:8]}.json"
        write_atomic(path, data)
        return path

    def run_files(self) -> list[Path]:
        """Return every stored run, oldest first."""
        return sorted((self.root / "runs").glob("*/*/*.json"), key=lambda path: path.name)

    def find_run(self, reference: str) -> Path:
        """Return the file of a run, named by its path, its file name or the digest at the end of that.

        Raises:
            UsageError: none or several fit.
        """
        if Path(reference).is_file():
            return Path(reference)
        files = self.run_files()
        matches = [path for path in files if path.stem == reference or path.stem.endswith(f"-{reference}")]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise UsageError(f"{reference!r} fits {len(matches)} runs in {self.root}: {', '.join(map(str, matches))}")
        hint = closest(reference, [path.stem for path in files])
        raise UsageError(
            f"{reference!r} is neither an artifact folder nor a run's file nor among the {len(files)} runs of "
            f"{self.root}{hint}"
        )

    def set_baseline(self, run_file: Path, why: str) -> tuple[Baseline, Path]:
        """Point a target's and model's baseline at a run, saying who did it and why."""
        if not why.strip():
            raise UsageError("a baseline needs a reason: --why must say why this run becomes the reference")
        run = load_run(run_file)
        baseline = Baseline(
            run=_relative(run_file, self.root),
            run_sha256=sha256_file(run_file),
            artifact_sha256=run.artifact.sha256,
            target=run.artifact.target,
            model=run.artifact.model,
            by=getpass.getuser(),
            why=why.strip(),
            set_utc=utc_now(),
        )
        path = self._baseline_file(run.artifact.target, run.artifact.model)
        write_json(path, baseline)
        return baseline, path

    def baselines(self) -> list[Baseline]:
        """Return every baseline."""
        files = sorted((self.root / "baselines").glob("*/*.json"))
        return [read_json(path, Baseline, BASELINE_FORMAT) for path in files]

    def baseline(self, target: str, model: str) -> Baseline | None:
        """Return the baseline of one target and model, or None."""
        path = self._baseline_file(target, model)
        return read_json(path, Baseline, BASELINE_FORMAT) if path.exists() else None

    def baseline_run(self, baseline: Baseline) -> Path:
        """Return the file of a baseline's run.

        Raises:
            DocumentError: gone, or edited since it was blessed.
        """
        path = self.root / baseline.run
        if not path.is_file():
            raise DocumentError(f"the baseline of {baseline.target}/{baseline.model} points at {path}, which is gone")
        if sha256_file(path) != baseline.run_sha256:
            raise DocumentError(
                f"{path} was changed after it became the baseline of {baseline.target}/{baseline.model}; "
                f"runs are never edited: restore it, or set a new baseline"
            )
        return path

    def _baseline_file(self, target: str, model: str) -> Path:
        return self.root / "baselines" / _as_name(target) / f"{_as_name(model)}.json"


def load_run(path: Path) -> Run:
    """Read a stored run."""
    return read_json(path, Run, FORMAT)


def _as_name(text: str) -> str:
    """Return a model or target name as one path component, reversibly and without separators.

    >>> _as_name("edgedeploy.demo.model:dense"), _as_name("../x")
    ('edgedeploy.demo.model%3Adense', '..%2Fx')
    """
    name = urllib.parse.quote(text, safe="")
    return name if name.strip(".") else name.replace(".", "%2E")


def _relative(path: Path, root: Path) -> str:
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return path.resolve().as_posix()
