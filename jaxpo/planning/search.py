"""Which settings fit the devices, and which of them are the fastest: the same estimate for each."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from jaxpo.config import Run
from jaxpo.models.decoder import Remat
from jaxpo.planning.hardware import Topology
from jaxpo.planning.memory import Memory, memory
from jaxpo.planning.speed import Times, times
from jaxpo.planning.work import FSDP, PRODUCTS, ROWS, STATES, TOKENS, Step

# How far from the truth the estimate of memory may be: what tests hold it to.
MARGIN = 0.15
# Changes of settings that are tried together.
AT_ONCE = 3
# Tokens of a row below which no device's part of it is tried.
LEAST_PART = 1024
POLICIES: tuple[Remat, ...] = ("none", "dots", "attention", "full", "offload")

Verdict = Literal["fits", "may fit", "does not fit"]


@dataclass(frozen=True)
class Estimate:
    """What a step takes of the memory and the time of some devices."""

    step: Step
    topology: Topology
    memory: Memory
    times: Times

    @property
    def verdict(self) -> Verdict:
        """`may fit` where a step fits by less than the estimate may be wrong."""
        room = self.topology.chip.usable
        if self.memory.peak > room:
            return "does not fit"
        return "fits" if self.memory.peak * (1 + MARGIN) <= room else "may fit"


def estimate(step: Step, topology: Topology) -> Estimate:
    return Estimate(step, topology, memory(step), times(step, topology))


@dataclass(frozen=True)
class Change:
    """Settings other than those of a run: as overrides of its config, and the run with them."""

    overrides: tuple[str, ...]
    run: Run
    estimate: Estimate


def changed(run: Run, overrides: Iterable[tuple[str, Any]]) -> Run:
    """The run with other values of some keys, each a section's."""
    for key, value in overrides:
        section, name = key.split(".")
        run = dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **{name: value})})
    return run


def _knobs(step: Step) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Settings that may take less memory, each by itself."""
    run, sizes, on_cpu = step.run, step.sizes, step.platform == "cpu"
    for remat in POLICIES[POLICIES.index(run.model.remat) + 1 :]:
        if not (on_cpu and remat == "offload"):
            yield (("model.remat", remat),)
    if (rows := run.training.rows_per_device) > 1:
        yield (("training.rows_per_device", rows // 2),)
    if not run.optimizer.offload and not on_cpu:
        yield (("optimizer.offload", True),)
    copies = [axis for axis in ROWS if axis != FSDP and sizes[axis] > 1]
    for axis in copies:
        if step.model.width % (sizes[FSDP] * sizes[axis]) == 0:
            yield (f"mesh.{FSDP}", sizes[FSDP] * sizes[axis]), (f"mesh.{axis}", 1)
    for axis in TOKENS:
        if sizes[FSDP] % 2 == 0 and _holds(run, 2 * sizes[axis]):
            yield (f"mesh.{axis}", 2 * sizes[axis]), (f"mesh.{FSDP}", sizes[FSDP] // 2)
    for axis in PRODUCTS:
        if sizes[FSDP] % 2 == 0 and step.model.num_kv_heads % (2 * sizes[axis]) == 0:
            yield (f"mesh.{axis}", 2 * sizes[axis]), (f"mesh.{FSDP}", sizes[FSDP] // 2)
    if run.model.dtype == "float32":
        if run.optimizer.state_dtype in (None, "float32"):
            yield (("optimizer.state_dtype", "bfloat16"),)
        yield (("model.dtype", "bfloat16"),)
    elif run.optimizer.state_dtype == "float32":
        yield (("optimizer.state_dtype", "bfloat16"),)


def knobs(now: Estimate) -> list[Change]:
    """Each single change that saves memory, those first that fit, the fastest of them first."""
    found = [_tried(now, (knob,)) for knob in _knobs(now.step)]
    less = [change for change in found if change.estimate.memory.peak < now.memory.peak]
    return sorted(less, key=lambda change: (*_misses(change), change.estimate.times.total))


def remedy(now: Estimate) -> Change | None:
    """The fewest changes with which a run fits, the fastest of those; None if no three do."""
    for count in range(1, AT_ONCE + 1):
        found = []
        for some in combinations(_knobs(now.step), count):
            keys = [key for knob in some for key, _ in knob]
            if len(set(keys)) == len(keys):
                found.append(_tried(now, some))
        fitting = [change for change in found if change.estimate.verdict == "fits"]
        if fitting:
            return min(fitting, key=lambda change: change.estimate.times.total)
    return None


def _misses(change: Change) -> tuple[bool, float]:
    """Whether it still does not fit, and by how much then."""
    short = change.estimate.memory.peak * (1 + MARGIN) - change.estimate.topology.chip.usable
    return short > 0, max(short, 0.0)


def _tried(now: Estimate, some: tuple[tuple[tuple[str, Any], ...], ...]) -> Change:
    overrides = [one for knob in some for one in knob]
    run = changed(now.step.run, overrides)
    said = tuple(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides)
    return Change(said, run, estimate(now.step.with_(run=run), now.topology))


def ranked(now: Estimate) -> list[Change]:
    """Meshes, rows_per_device and remat policies that fit; first the fastest, of equals to 3 digits the smallest."""
    found = []
    for mesh in _meshes(now.step):
        of_mesh = [(f"mesh.{axis}", size) for axis, size in mesh.items()]
        rows = 1
        most = max(now.step.batches.rows) / now.step.with_(run=changed(now.step.run, of_mesh)).ways(*ROWS)
        while rows == 1 or rows <= most:
            for remat in POLICIES:
                if now.step.platform == "cpu" and remat == "offload":
                    continue
                settings = (*of_mesh, ("training.rows_per_device", rows), ("model.remat", remat))
                found.append(_tried(now, (settings,)))
            rows *= 2
    fitting = [change for change in found if change.estimate.verdict != "does not fit"]
    return sorted(
        fitting, key=lambda change: (float(f"{change.estimate.times.total:.3g}"), change.estimate.memory.peak)
    )


def _meshes(step: Step) -> Iterator[dict[str, int]]:
    """Sizes of the axes whose product is that of now, as far as they divide the model."""

    def of(axes: tuple[str, ...], devices: int) -> Iterator[dict[str, int]]:
        if not axes:
            if devices == 1:
                yield {}
            return
        axis, *rest = axes
        for size in (size for size in range(1, devices + 1) if devices % size == 0):
            yield from ({axis: size, **others} for others in of(tuple(rest), devices // size))

    for sizes in of(tuple(step.sizes), step.devices):
        tensor = all(step.model.num_kv_heads % sizes[axis] == 0 for axis in PRODUCTS)
        tokens = _holds(step.run, math.prod(sizes[axis] for axis in TOKENS))
        if tensor and tokens and step.model.width % math.prod(sizes[axis] for axis in STATES) == 0:
            yield sizes


def _holds(run: Run, devices: int) -> bool:
    """Whether a row is long enough to be shared by so many devices."""
    return devices == 1 or run.training.row_length >= devices * LEAST_PART
