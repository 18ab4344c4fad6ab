"""bench_results/: runs are appended and never edited; a baseline is a small pointer whose change can be reviewed."""

from __future__ import annotations

import getpass
import re
import urllib.parse
from datetime import UTC, datetime
from pathlib import Path

from edgedeploy.documents import Record, RecordType, closest, encode_json, read_json, write_json
from edgedeploy.errors import DocumentError, InternalError, UsageError
from edgedeploy.records.explanation import Explanation
from edgedeploy.records.passport import AA_FORMAT, AaOutcome, Passport
from edgedeploy.records.passport import FORMAT as PASSPORT_FORMAT
from edgedeploy.records.run import BASELINE_FORMAT, FORMAT, Baseline, Run
from edgedeploy.storage import create_atomic, sha256_bytes, sha256_file

# What `Results` calls what it appends: the second, and the digest of the bytes.
_APPENDED = re.compile(r"\d{8}T\d{6}Z-(?P<digest>[0-9a-f]{8}|[0-9a-f]{64})")


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
        folder = self.root / "runs" / _as_name(run.artifact.target) / _as_name(run.artifact.model)
        return self._append(folder, run.started_utc, run)

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

    def save_explanation(self, explanation: Explanation) -> Path:
        """Append an explanation as explanations/<UTC time>-<digest8>.json."""
        return self._append(self.root / "explanations", explanation.explained_utc, explanation)

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

    def save_passport(self, passport: Passport) -> Path:
        """Append a device's passport as passports/<device>/<UTC time>-<digest8>.json."""
        return self._append(self.root / "passports" / _as_name(passport.device), passport.started_utc, passport)

    def passport_files(self, device: str) -> list[Path]:
        """Return the files of a device's passports, oldest first."""
        return sorted((self.root / "passports" / _as_name(device)).glob("*.json"), key=lambda path: path.name)

    def newest_passport(self, device: str) -> tuple[Passport, Path] | None:
        """Return the newest passport of a device and its file; None where it has none.

        Raises:
            DocumentError: it was changed by hand, or cannot be read.
        """
        files = self.passport_files(device)
        return (_read_appended(files[-1], Passport, PASSPORT_FORMAT), files[-1]) if files else None

    def save_aa(self, outcome: AaOutcome) -> Path:
        """Append what a gate of something against itself said as aa/<UTC time>-<digest8>.json."""
        return self._append(self.root / "aa", outcome.judged_utc, outcome)

    def aa_outcomes(self, newest: int = 1000) -> list[AaOutcome]:
        """Return what the newest gates of something against itself said, oldest first.

        Raises:
            DocumentError: one was changed by hand, or cannot be read.
        """
        files = sorted((self.root / "aa").glob("*.json"), key=lambda path: path.name)
        return [_read_appended(path, AaOutcome, AA_FORMAT) for path in files[-newest:]]

    def _append(self, folder: Path, utc: str, record: Record) -> Path:
        """Write a record under a name that no other one has, whoever else writes at the same moment."""
        data = encode_json(record)
        time, digest = re.sub(r"[^0-9TZ]", "", utc), sha256_bytes(data)
        for length in (8, len(digest)):
            path = folder / f"{time}-{digest[:length]}.json"
            if create_atomic(path, data) or path.read_bytes() == data:
                return path
        raise InternalError(f"{path} is named by its digest and holds something else")

    def _baseline_file(self, target: str, model: str) -> Path:
        return self.root / "baselines" / _as_name(target) / f"{_as_name(model)}.json"


def load_run(path: Path) -> Run:
    """Read a stored run; one whose name was given by `Results` must still be what was written.

    Raises:
        DocumentError: truncated, of a newer format, damaged, or changed by hand.
    """
    return _read_appended(path, Run, FORMAT)


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


def _read_appended(path: Path, record: type[RecordType], kind: str) -> RecordType:
    """Read what was appended once; where its name carries a digest, that tells whether it is still what was written."""
    found = read_json(path, record, kind)  # what is torn or too new is told as that
    named = _APPENDED.fullmatch(path.stem)
    digest = sha256_file(path)
    if named is not None and not digest.startswith(named["digest"]):
        raise DocumentError(
            f"{path} was changed after it was written: its name carries the digest {named['digest']} and its bytes "
            f"have {digest[: len(named['digest'])]}; what was measured is never edited: restore the file, or delete it"
        )
    return found
