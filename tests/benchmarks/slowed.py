"""One session of several sides of one artifact, some of them slowed by an exact share, on purpose.

The device half of each side is ONNX Runtime's own with a few lines below it: after each inference it spins for slow_by
times as long as the inference took. So the true change is slow_by in every inference, whatever state the machine is in;
a side that is slowed by nothing runs through the same lines. `slowdown` shows within one process what that comes to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgedeploy
from edgedeploy.backends import session_file, session_options
from edgedeploy.build import Built
from edgedeploy.lab import bundle, visits
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.inventory import open_transport
from edgedeploy.lab.visits import Schedule, Side
from edgedeploy.measure import artifact_reference
from edgedeploy.prepare.dataset import inference_batch, random_samples
from edgedeploy.records.device import Device
from edgedeploy.records.run import Boundary, Run, Visit
from edgedeploy.records.target import ConditionLimits
from edgedeploy.results import utc_now
from edgedeploy.storage import sha256_file, write_atomic

_SLOWED = '''

import time as _time


class _Slowed(Session):
    """Spins after each inference for slow_by times as long as it took: a benchmark's, on purpose."""

    def __init__(self, artifact, options):
        options = dict(options)
        self.slow_by = options.pop("slow_by")
        super().__init__(artifact, options)

    def infer(self):
        started = _time.perf_counter_ns()
        super().infer()
        extra = (_time.perf_counter_ns() - started) * self.slow_by
        # Counted from here: what these lines take themselves, a microsecond, every side takes alike.
        end = _time.perf_counter_ns() + extra
        while _time.perf_counter_ns() < end:
            pass


Session = _Slowed
'''


@dataclass(frozen=True, slots=True)
class Site:
    """A connected device with everything on it.

    Attributes:
        sides: label → side, in the order in which they were asked for.
    """

    agent: Agent
    sides: Mapping[str, Side]


def slowdown(built: Built, shares: Sequence[float], folder: Path, rounds: int = 500) -> dict[float, float]:
    """Return by which share inferences really became slower, for each asked share, in one session of one process.

    Between processes inferences differ by a percent for other reasons, such as where their memory lies; here only the
    share changes from one inference to the next, in a random order.
    """
    session = _load(_slowed_session(built, folder))(str(built.file), {**session_options(built.artifact), "slow_by": 0})
    samples = random_samples(built.artifact.inputs, 1, seed=0).batch(0, 1)
    session.bind({name: (array.tobytes(), str(array.dtype), array.shape) for name, array in samples.items()})
    taken_ns: dict[float, list[int]] = {share: [] for share in (0.0, *shares)}
    order = random.Random(0)
    for _ in range(rounds):
        for share in order.sample(list(taken_ns), len(taken_ns)):
            session.slow_by = share
            session.infer()
            started_ns = time.perf_counter_ns()
            session.infer()
            taken_ns[share].append(time.perf_counter_ns() - started_ns)
    usual_ns = statistics.median(taken_ns[0.0])
    return {share: statistics.median(taken_ns[share]) / usual_ns - 1 for share in shares}


def _slowed_session(built: Built, folder: Path) -> Path:
    path = folder / "slowed_session.py"
    text = session_file(built.artifact.recipe.backend).read_text(encoding="utf-8")
    path.write_text(text + _SLOWED, encoding="utf-8")
    return path


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Session


@contextlib.contextmanager
def slowed_sides(built: Built, shares: Mapping[str, float], folder: Path) -> Iterator[Site]:
    """Connect to this machine and put an artifact there under several labels, each slowed by its share."""
    from safetensors.numpy import save

    session = _slowed_session(built, folder)
    batch = inference_batch(built.artifact.inputs)
    samples = random_samples(built.artifact.inputs, batch, seed=0)
    inputs = folder / "inputs.safetensors"
    write_atomic(inputs, save(samples.batch(0, samples.count)))
    digests = {path: sha256_file(path) for path in (session, inputs, built.file)}
    sides = {
        label: Side(
            cell=label,
            artifact_sha256=digests[built.file],
            session_sha256=digests[session],
            options={**session_options(built.artifact), "slow_by": share},
            inputs_sha256=digests[inputs],
            batch=batch,
        )
        for label, share in shares.items()
    }
    device = Device(transport="local")
    with (
        open_transport("local", device) as transport,
        bundle.connect(transport, device, device_name="local") as agent,
    ):
        bundle.ship(agent, transport, {digest: path for path, digest in digests.items()})
        yield Site(agent, sides)


@contextlib.contextmanager
def in_random_order() -> Iterator[None]:
    """Have the sides of each round take their turns in a random order: ABBA is an order for two."""

    def order(numbers: Sequence[int], bursts: int, seed: int, block: int) -> Iterator[tuple[int, int]]:
        shuffled = random.Random(f"{seed}/{block}")
        for pair in range(bursts):
            for number in shuffled.sample(list(numbers), len(numbers)):
                yield pair, number

    usual = visits._burst_order
    visits._burst_order = order
    try:
        yield
    finally:
        visits._burst_order = usual


def block_of(
    site: Site, labels: Sequence[str], schedule: Schedule, limits: ConditionLimits, *, block: int, seed: int
) -> dict[str, Visit]:
    """Measure the labelled sides once, all of them alive together; return label → its visit."""
    sides = [site.sides[label] for label in labels]
    with in_random_order():
        measured = visits.measure_block(site.agent, sides, schedule, block=block, seed=seed)
    return {one.side.cell: visits.mark(one.visit, limits) for one in measured}


def run_of(built: Built, site: Site, label: str, taken: Sequence[Visit], session: str, *, is_baseline: bool) -> Run:
    """Return what the judge takes: a run with these visits and nothing else."""
    return Run(
        session=session,
        cell=label,
        side="baseline" if is_baseline else "candidate",
        artifact=artifact_reference(built.artifact),
        device="local",
        facts=site.agent.facts,
        runtime="",
        boundary=Boundary(includes_input_copy=False, includes_output_copy=True, threads=1, batch=1),
        schedule="a duet of several sides",
        started_utc=utc_now(),
        visits=tuple(taken),
        memory=(),
        outputs=None,
        edgedeploy=edgedeploy.__version__,
        runner_sha256="",
    )
