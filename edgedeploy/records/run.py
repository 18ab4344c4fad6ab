"""Everything one benchmark said: raw samples, conditions, outputs' digests; never edited."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record
from edgedeploy.records.artifact import OptionValue
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.model import Fidelity
from edgedeploy.records.target import Precision

# History of edgedeploy.run:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.run/1"

# History of edgedeploy.baseline:
#   1 (0.1.0)  first version
BASELINE_FORMAT = "edgedeploy.baseline/1"


class Conditions(Record, frozen=True, kw_only=True):
    """The device's state at one moment; None means "not available", never zero.

    Attributes:
        cpu_clocks_hz: current frequency per core.
        governors: cpufreq governor per core.
        temperatures_celsius: thermal zone → temperature.
        throttled: whether the board or the kernel holds its clocks down now.
        throttle_reasons: the kernel's thermal limits that hold now, by name; () where it has some and none holds.
        throttle_events: guard of the power supply → how often since boot it slowed the board down.
        load_1min: the kernel's one-minute load average.
        busy_core_s: CPU time used by all processes since boot (user + system), in core-seconds.
        own_core_s: CPU time used by the measured process so far.
        power_mode: what nvpmodel was set to, "MODE_30W (2)".
        clocks_fixed: whether the cores and the GPU have one clock only, as after jetson_clocks.
        gpu_clock_hz, emc_clock_hz: of the GPU and of the memory's controller.
        rails_w: supply rail → watts; an idle rail may be measured a little below zero.
        fan_rpm: turns a minute.
        fan_drive: share of full drive, 0 to 1.
    """

    monotonic_s: float
    cpu_clocks_hz: tuple[float, ...] | None = None
    governors: tuple[str, ...] | None = None
    temperatures_celsius: dict[str, float] | None = None
    throttled: bool | None = None
    load_1min: float | None = None
    busy_core_s: float | None = None
    own_core_s: float | None = None
    free_memory_bytes: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    throttle_events: dict[str, int] | None = None
    power_mode: str | None = None
    clocks_fixed: bool | None = None
    gpu_clock_hz: float | None = None
    emc_clock_hz: float | None = None
    rails_w: dict[str, float] | None = None
    fan_rpm: float | None = None
    fan_drive: float | None = None


class Boundary(Record, frozen=True, kw_only=True):
    """What was inside the timed region; numbers with unlike boundaries refuse to be compared."""

    includes_input_copy: bool
    includes_output_copy: bool
    threads: int
    batch: int
    detail: str = ""


class Burst(Record, frozen=True, kw_only=True):
    """Consecutive timed inferences.

    Attributes:
        pair: number of the A/B burst pair within the block that this burst belongs to.
        samples_s: seconds per inference, in order.
    """

    pair: int
    samples_s: tuple[float, ...]


class Visit(Record, frozen=True, kw_only=True):
    """One fresh process on the device.

    Attributes:
        block: number of the A/B block; visits of baseline and candidate with the same block belong together.
        position: order of opening within the block.
        load_s: from the artifact's path to a session that is ready to infer.
        first_inference_s: the first inference after load.
        warm_up_samples_s: inferences before steady state, in order.
        is_steady: whether two adjacent warm-up windows agreed before the cap.
        dropped: why this visit's pair does not count; "" when it does.
        cooled_s: how long it waited for the device to cool; None: no temperature to wait for was asked for.
        is_cool: whether it was cool enough then; None also where the device has no thermal zone.
    """

    block: int
    position: int
    load_s: float
    first_inference_s: float
    warm_up_samples_s: tuple[float, ...]
    is_steady: bool
    bursts: tuple[Burst, ...]
    before: Conditions
    after: Conditions
    foreign_load: float | None = None
    dropped: str = ""
    cooled_s: float | None = None
    is_cool: bool | None = None


class MemoryVisit(Record, frozen=True, kw_only=True):
    """A visit of its own that measures memory by the kernel's high-water mark.

    Attributes:
        peak_rss_bytes: VmHWM after inference.
        import_rss_bytes: VmHWM after the runtime was imported, before the artifact was loaded.
    """

    peak_rss_bytes: int
    import_rss_bytes: int


class LayerTime(Record, frozen=True, kw_only=True):
    """What one operator takes while the runtime watches them all, which makes the whole slower.

    Attributes:
        name: the runtime's; kind: the runtime's word for what it computes, "" where it does not say.
        p50_s: median over the inferences of the pass.
    """

    name: str
    kind: str
    p50_s: float


class Outputs(Record, frozen=True, kw_only=True):
    """The artifact's answers on the evaluation set, computed on the device.

    Attributes:
        sha256: digest of the safetensors file with all outputs, kept in the cache.
        metric: "top1", "top5" (scores are 0 or 1) or "mae" (scores are errors, smaller is better).
        scores: one per sample, in the data set's order; None without labels.
        value: the mean of `scores`.
        is_repeatable: whether a second pass over the first samples gave the same bytes.
        labels: the true class of each sample, for top1 and top5; None without labels.
        predictions: the arg-max of each sample, likewise; None where the judged output has no row of class scores.
    """

    dataset: str
    dataset_sha256: str
    samples: int
    sha256: str
    metric: str
    scores: tuple[float, ...] | None
    value: float | None
    is_repeatable: bool | None = None
    labels: tuple[int, ...] | None = None
    predictions: tuple[int, ...] | None = None


class ArtifactReference(Record, frozen=True, kw_only=True):
    """Which artifact was measured."""

    name: str
    sha256: str
    size_bytes: int
    key: str
    model: str
    target: str
    backend: str
    precision: Precision
    options: dict[str, OptionValue]


class Run(Record, frozen=True, kw_only=True):
    """One artifact measured on one device in one session.

    Attributes:
        session: shared by the runs that were measured interleaved with each other; only these are paired by block.
        cell: the release file's name of the cell, or the artifact's.
        schedule: in words, how bursts were taken and alternated.
        boundary: None when not a single visit succeeded.
        layer_times: operator by operator, from a pass of its own; empty where it was not asked for.
        golden: its answers on this device beside the golden ones; None where the artifact has none.
        side: "baseline" or "candidate" in an A/B session, "single" alone.
        events: what happened that a reader should know (a dropped pair, a child that died), in order.
        settings_applied: what the device was set to meanwhile, "governor" → "performance".
        settings_refused: what it could not be set to → why.
        sentinel: visits of a small model that never changes, on the same runtime in the same session: block -1 before
            the first block, the number of blocks done after the last; empty where there is none.
        sentinel_sha256: of that model as it was compiled.
    """

    format: str = FORMAT
    session: str
    cell: str
    side: Literal["single", "baseline", "candidate"]
    artifact: ArtifactReference
    device: str
    facts: DeviceFacts
    runtime: str
    boundary: Boundary | None
    golden: Fidelity | None = None
    layer_times: tuple[LayerTime, ...] = ()
    schedule: str
    started_utc: str
    visits: tuple[Visit, ...]
    memory: tuple[MemoryVisit, ...]
    outputs: Outputs | None
    events: tuple[str, ...] = ()
    settings_applied: dict[str, str] = {}
    settings_refused: dict[str, str] = {}
    sentinel: tuple[Visit, ...] = ()
    sentinel_sha256: str = ""
    edgedeploy: str
    runner_sha256: str


class Baseline(Record, frozen=True, kw_only=True):
    """A pointer to a blessed run."""

    format: str = BASELINE_FORMAT
    run: str
    run_sha256: str
    artifact_sha256: str
    target: str
    model: str
    by: str
    why: str
    set_utc: str
