"""Metrics on their way out: means on the host, metrics.jsonl, TensorBoard, Weights & Biases."""

import importlib.util
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import jax

from jaxpo import atomic
from jaxpo.batch import Metric
from jaxpo.config import LoggingConfig, Run
from jaxpo.config_file import as_mapping
from jaxpo.errors import UserError

FILE = "metrics.jsonl"
Record = dict[str, float | int | None]


class Total(NamedTuple):
    """A `Metric` on the host, in float64."""

    sum: float
    weight: float


def total(parts: Iterable[Mapping[str, Metric]], so_far: Mapping[str, Total] | None = None) -> dict[str, Total]:
    """The sum of metrics over steps or batches, added to what there is so far."""
    totals = dict(so_far or {})
    for part in jax.device_get(list(parts)):
        for name, metric in part.items():
            before = totals.get(name, Total(0.0, 0.0))
            totals[name] = Total(before.sum + float(metric.sum), before.weight + float(metric.weight))
    return totals


def means(metrics: Mapping[str, Total], prefix: str = "") -> Record:
    """Sum / weight of each metric, its name with a prefix; None where there was nothing to take the mean of."""
    taken = {name: m.sum / m.weight if m.weight else None for name, m in metrics.items()}
    return {prefix + name: value for name, value in derived(taken).items()}


def derived(taken: Record) -> Record:
    """The means of one line with those that follow from them, in place of what they follow from.

    `rewards/margins` of single answers, as TRL: of the desirable ones' mean and the others'. `calibration_error`, of a
    reward model's parts `calibration/N`.
    """
    out = {name: value for name, value in taken.items() if not name.startswith(("calibration/", "reward_shift/"))}
    chosen, rejected = taken.get("rewards/chosen"), taken.get("rewards/rejected")
    if "rewards/margins" not in out and chosen is not None and rejected is not None:
        out["rewards/margins"] = chosen - rejected
    parts = [value for name, value in taken.items() if name.startswith("calibration/")]
    if parts:
        out["calibration_error"] = sum(abs(value) for value in parts if value is not None)
    return out


def finite(record: Record) -> Record:
    """The record with None for what is not finite, which JSON cannot say."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}


def read(folder: Path) -> list[Record]:
    """The records of a run so far; a last line that a crash has cut or damaged is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    *lines, cut = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_parse(line))
        except (ValueError, RecursionError) as error:
            if cut or number < len(lines):
                raise UserError(
                    f"{path}:{number} is damaged: {error}. Expected a JSON object with a whole number for step. Put "
                    "the line back as it was, or move the file away to go on without what it says."
                ) from None
    return records


def _parse(line: bytes) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("it is no line of metrics")
    return record


def checksum(records: Sequence[Record], before: int = 0) -> int:
    """The CRC-32 of the records' lines, after lines whose checksum is `before`."""
    return zlib.crc32(_text(records).encode(), before)


def _text(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


class Known(NamedTuple):
    """What a checkpoint knows of metrics.jsonl: how many lines it held, the last, the checksum of those before it."""

    lines: int
    last: Record
    checksum_before: int


class Sink(Protocol):
    """Somewhere metrics go."""

    def write(self, step: int, record: Record) -> None: ...

    def flush(self) -> None:
        """What was written lasts once this returns, as far as that is in our hands."""
        ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: a line per logged step, each flushed as it is written.

    Opened at a step, it drops what was written after the checkpoint, which a resumed run writes again: an evaluation
    that SIGTERM had left out, too, which goes into that step's line. The last line is written as the checkpoint knows
    it, whatever became of it. Raises UserError if others are missing or were changed, unless all were given up.
    """

    def __init__(self, folder: Path, step: int, known: Known) -> None:
        self._path, self._opened_at = folder / FILE, step
        self._kept = [*self._before(folder, known), dict(known.last)] if known.lines else []
        self._file = self._begin()

    def _before(self, folder: Path, known: Known) -> list[Record]:
        """The lines before the last one that a checkpoint knows."""
        there = read(folder)
        if not self._path.exists() or (there and there[0]["step"] == known.last["step"]):
            # They were given up, now or by a process before this one.
            return []
        kept = there[: known.lines - 1]
        if checksum(kept) != known.checksum_before:
            raise UserError(
                f"{self._path} is damaged: its first {known.lines - 1} lines are not those that it held when the "
                "checkpoint to go on from was saved. Put it back as it was, or move the file away to go on without "
                "what it says."
            )
        return kept

    def _begin(self) -> TextIO:
        atomic.write_text(self._path, _text(self._kept))
        return self._path.open("a", encoding="utf-8")

    def write(self, step: int, record: Record) -> None:
        with atomic.naming(self._path):
            if self._kept and self._kept[-1]["step"] == step == self._opened_at:
                self._kept[-1] |= finite(record)
                self._file.close()
                self._file = self._begin()
                return
            self._file.write(json.dumps({"step": step, **finite(record)}) + "\n")
            self._file.flush()

    def flush(self) -> None:
        with atomic.naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with atomic.naming(self._path):
            self._file.close()


class TensorBoard:
    """Event files under tensorboard/, written by tensorboardX."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def write(self, step: int, record: Record) -> None:
        for name, value in record.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A Weights & Biases run that a resumed training goes on with: its id is kept in the run's folder."""

    def __init__(self, folder: Path, run: Run, step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  (an extra)

        assert run.logging.wandb is not None
        settings = run.logging.wandb
        id_file = folder / "wandb_id"
        # A run that begins anew writes its steps again, which W&B would not take for the same run.
        if step == 0 or not id_file.exists():
            atomic.write_text(id_file, wandb.util.generate_id())
        try:
            self._run: Any = wandb.init(
                project=settings.project,
                name=settings.name or folder.name,
                entity=settings.entity,
                mode=settings.mode,
                id=id_file.read_text(),
                resume="allow",
                dir=str(folder),
                config=as_mapping(run),
            )
        except Exception as error:  # a missing login or network raises one of several kinds
            raise UserError(
                f"logging.wandb cannot be used: {' '.join(str(error).split())}. Log in with `wandb login`, or set "
                "logging.wandb.mode to offline."
            ) from error

    def write(self, step: int, record: Record) -> None:
        self._run.log({k: v for k, v in record.items() if v is not None}, step=step)

    def flush(self) -> None:
        """wandb sends in the background and keeps what it has not sent in its own files."""

    def close(self) -> None:
        self._run.finish()


def check_installed(config: LoggingConfig) -> None:
    """Raise UserError if a package is missing that the config asks for."""
    asked = {
        "tensorboardX": "tensorboard" if config.tensorboard else None,
        "wandb": "wandb" if config.wandb is not None else None,
    }
    for package, key in asked.items():
        if key is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"logging.{key} is asked for, but {package} is not installed; expected the extra: pip install "
                f"'jaxpo[{key}]'."
            )


def open_sinks(run: Run, folder: Path, step: int, known: Known) -> list[Sink]:
    """The sinks that the config asks for, from a step on; JSONL always."""
    config: LoggingConfig = run.logging
    sinks: list[Sink] = [JsonLines(folder, step, known)]
    if config.tensorboard:
        sinks.append(TensorBoard(folder, step))
    if config.wandb is not None:
        sinks.append(Wandb(folder, run, step))
    return sinks
