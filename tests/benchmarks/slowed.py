"""One session of several sides of one artifact, some of them slowed by an exact share, on purpose.

The device half of each side is ONNX Runtime's own with a few lines below it: after each inference it spins until the
inference has taken (1 + slow_by) times as long as it did. So the true change is slow_by in every inference, whatever
state the machine is in; a side that is slowed by nothing runs through the same lines.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """Spins after each inference until it has taken (1 + slow_by) times as long: a benchmark's, on purpose."""

    def __init__(self, artifact, options):
        options = dict(options)
        self._factor = 1.0 + options.pop("slow_by")
        super().__init__(artifact, options)

    def infer(self):
        started = _time.perf_counter_ns()
        super().infer()
        end = started + (_time.perf_counter_ns() - started) * self._factor
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


@contextlib.contextmanager
def slowed_sides(built: Built, shares: Mapping[str, float], folder: Path) -> Iterator[Site]:
    """Connect to this machine and put an artifact there under several labels, each slowed by its share."""
    from safetensors.numpy import save

    backend = built.artifact.recipe.backend
    session = folder / "slowed_session.py"
    session.write_text(session_file(backend).read_text(encoding="utf-8") + _SLOWED, encoding="utf-8")
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


def block_of(site: Site, schedule: Schedule, limits: ConditionLimits, *, block: int, seed: int) -> dict[str, Visit]:
    """Measure every side once, all of them alive together; return label → its visit."""
    with in_random_order():
        measured = visits.measure_block(site.agent, list(site.sides.values()), schedule, block=block, seed=seed)
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
