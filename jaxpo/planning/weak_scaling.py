"""How well a run would scale: the same work for each chip, on ever more of them, by the roofline of `speed`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jaxpo.config import Run
from jaxpo.models.decoder import DecoderConfig
from jaxpo.planning.hardware import Chip, of_count
from jaxpo.planning.search import Estimate, changed, estimate
from jaxpo.planning.work import Batches, Step
from jaxpo.prepare import attention_of
from jaxpo.training.flops import Counts, useful

ASSUMPTIONS = (
    "Each chip computes the same rows in one microbatch, whatever their number; the batch grows with the chips.",
    "fsdp lies within a slice or a host, copies (data) across; of the sizes that fit, the one with the fastest step.",
    "Products, memory and links at their published peak, so that links are not flattered by slow products.",
    "fsdp's gathers and scatters go on while products do (`serial`: they do not); sums over data are waited for.",
    "Efficiency is the time of a step without links over its time with them.",
)


@dataclass(frozen=True)
class Point:
    """A step on so many chips. efficiency: of 1, what is left of a chip's speed; serial: the same if products waited
    for every link. mfu: useful arithmetic over peak.
    """

    chips: int
    estimate: Estimate
    efficiency: float
    serial: float
    mfu: float


def curve(run: Run, model: DecoderConfig, chip: Chip, counts: Iterable[int], example: Counts) -> Iterator[Point]:
    """Efficiency at each number of chips where the run fits; a row of the run is `example` once or several times.

    example: what a row holds. A number of chips on which nothing fits has no point.
    """
    for chips in counts:
        points = [_point(run, model, chip, chips, fsdp, example) for fsdp in _sizes(model, chip, chips)]
        fitting = [point for point in points if point.estimate.verdict != "does not fit"]
        if fitting:
            yield min(fitting, key=lambda point: point.estimate.times.total)


def _sizes(model: DecoderConfig, chip: Chip, chips: int) -> list[int]:
    """Sizes of fsdp within an island of so many chips."""
    inside = min(chips, chip.island)
    return [size for size in range(1, inside + 1) if inside % size == 0 and model.width % size == 0]


def _point(run: Run, model: DecoderConfig, chip: Chip, chips: int, fsdp: int, row: Counts) -> Point:
    rows = chips * run.training.rows_per_device
    mesh = [("mesh.data", chips // fsdp), ("mesh.fsdp", fsdp), ("mesh.sequence", 1), ("mesh.tensor", 1)]
    counts = Counts(*(rows * count for count in row))
    batches = Batches(counts, (rows,), row.tokens / run.training.row_length, "rows of equal work")
    attention = attention_of(run, chip.platform, model.head_dim)
    found = estimate(Step(changed(run, mesh), model, batches, chip.platform, attention), of_count(chip, chips))
    alone = found.times._replace(overlapped=0.0, exposed=0.0).total
    seconds = found.times.total
    mfu = useful(model, counts) / chips / chip.peak(run.model.compute_dtype) / seconds
    serial = alone / (alone + found.times.overlapped + found.times.exposed)
    return Point(chips, found, alone / seconds, serial, mfu)
