"""The training loop: steps, and between them logging, evaluation and checkpoints."""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from jaxpo import atomic, console, processes
from jaxpo.batch import Carry, DeviceBatch, HostBatch, Metrics
from jaxpo.config import ControlConfig, TrainingConfig
from jaxpo.data.loader import Step
from jaxpo.errors import UserError
from jaxpo.models.decoder import Decoder
from jaxpo.training.checkpoint import Checkpoints
from jaxpo.training.control import Stop, Watch, logged
from jaxpo.training.evaluate import PREFIX
from jaxpo.training.metrics import Known, Record, Sink, Total, checksum, finite, means, total
from jaxpo.training.moving_reference import Reference, Sync, checkpointed
from jaxpo.training.step import StepResult, TrainState

TERMINATED = 128 + signal.SIGTERM


@dataclass
class Progress:
    """What a resumed run must know besides its state; saved with each checkpoint.

    places and tokens count row places computed and those that held a token. The `steady` figures leave out steps whose
    shapes are new to the process, which compile, and what was computed meanwhile. seconds: of each stage; `wait` is for
    data in training, `log` of metrics on their way out. window holds the metrics since the last logged line as [sum,
    weight]. lines: of metrics.jsonl; line: the last of them; checksum_before: of the others. With other fields
    checkpoints are of another `checkpoint.VERSION`.
    """

    examples: int = 0
    tokens: int = 0
    places: int = 0
    steady_examples: int = 0
    steady_tokens: int = 0
    steady_flops: float = 0.0
    steady_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    window: dict[str, list[float]] = field(default_factory=dict)
    lines: int = 0
    line: Record = field(default_factory=dict)
    checksum_before: int = 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage's seconds; what a stage inside it has taken is that one's alone."""
        start, others = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - others
            self.add(stage, time.perf_counter() - start - inside)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def rates(self) -> Record:
        """Pairs (or other examples), tokens and useful teraflops per second, and the share of places that held none.

        Of all devices together; None before a second step.
        """

        def per_second(amount: float) -> float | None:
            return amount / self.steady_seconds if self.steady_seconds else None

        return {
            "pairs_per_s": per_second(self.steady_examples),
            "tokens_per_s": per_second(self.steady_tokens),
            "tflops_per_s": per_second(self.steady_flops / 1e12),
            "padding_fraction": self.padding,
        }

    def count(self, step: Step, seconds: float, flops: float | None) -> None:
        """Count a step that took so many seconds; flops: of its useful arithmetic, None for one that is not steady."""
        tokens, places = count_places(step.batch)
        self.examples += len(step.examples)
        self.tokens += tokens
        self.places += places
        if flops is not None:
            self.steady_seconds += seconds
            self.steady_examples += len(step.examples)
            self.steady_tokens += tokens
            self.steady_flops += flops

    def log(self, n: int, line: Record) -> None:
        """Remember a line of step n, or what is added to it."""
        if self.line.get("step") != n:
            self.checksum_before = checksum([self.line] if self.line else [], self.checksum_before)
            self.lines, self.line = self.lines + 1, {"step": n}
        self.line |= finite(line)

    @property
    def known(self) -> Known:
        return Known(self.lines, self.line, self.checksum_before)

    def go_on_after(self, records: Sequence[Record]) -> None:
        """Begin with the lines that metrics.jsonl holds."""
        self.lines, self.checksum_before = len(records), checksum(records[:-1])
        self.line = dict(records[-1]) if records else {}

    def after(self, earlier: "Progress") -> "Progress":
        """The progress of an earlier process, with this one's seconds added."""
        stages = self.seconds.keys() | earlier.seconds.keys()
        seconds = {stage: self.seconds.get(stage, 0.0) + earlier.seconds.get(stage, 0.0) for stage in stages}
        return replace(earlier, seconds=seconds)

    @property
    def padding(self) -> float | None:
        return 1.0 - self.tokens / self.places if self.places else None


class Clock:
    """The time between steps. What of it went into no stage of `progress` went into training."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self.start()

    def start(self) -> None:
        self._since, self._told = time.perf_counter(), sum(self._progress.seconds.values())

    def lap(self) -> float:
        """Seconds since the last lap or start."""
        seconds = time.perf_counter() - self._since
        self._progress.add("train", seconds - (sum(self._progress.seconds.values()) - self._told))
        self.start()
        return seconds


@dataclass(frozen=True)
class Loop:
    """All that the loop works with.

    records: the lines of metrics.jsonl up to the step that is gone on from. batches(first, last, references): steps
    first (inclusive) to last (exclusive), with the reference's statistics [N, Q, K] of all training data. example_id
    names an example. evaluate: as `make_evaluation`. sync: how the reference moves, None for one that stays. flops: of
    a step, see `training.flops`; peak_flops: what the devices could do in a second, None where that is not known.
    """

    config: TrainingConfig
    control: ControlConfig
    folder: Path
    records: Sequence[Record]
    num_steps: int
    log_every: int
    steps_per_epoch: float
    step: Callable[[TrainState, DeviceBatch], tuple[TrainState, StepResult]]
    put: Callable[[HostBatch], DeviceBatch]
    batches: Callable[[int, int, np.ndarray | None], Iterator[Step]]
    example_id: Callable[[int], str]
    evaluate: Callable[[Decoder, Carry], Record] | None
    sync: Sync | None
    learning_rate: optax.Schedule
    flops: Callable[[HostBatch], float]
    peak_flops: float | None
    checkpoints: Checkpoints
    sinks: Sequence[Sink]

    def evaluates_at(self, n: int) -> bool:
        every = self.config.eval_every
        return self.evaluate is not None and (n in (0, self.num_steps) or (every is not None and n % every == 0))

    def saves_at(self, n: int) -> bool:
        best = self.config.best_metric is not None and self.evaluates_at(n)
        due = any(every is not None and n % every == 0 for every in (self.config.save_every, self.config.keep_every))
        return n > 0 and (n == self.num_steps or best or due)

    def logs_at(self, n: int) -> bool:
        return n % self.log_every == 0 or n == self.num_steps

    def pauses_at(self, n: int) -> bool:
        """Whether the step after n has to wait for what comes of step n."""
        may_stop = self.control.max_kl is not None and self.logs_at(n)
        last = n == self.num_steps
        return last or may_stop or self.evaluates_at(n) or self.saves_at(n) or self.syncs_after(n)

    def syncs_after(self, n: int) -> bool:
        return self.sync is not None and self.sync.due(n) and n < self.num_steps

    def window_end(self, n: int) -> int:
        """The last step with the reference as it is after step n."""
        return self.num_steps if self.sync is None else min(self.sync.window_end(n), self.num_steps)


class Ended(NamedTuple):
    """How a training ended: after which step, with which weights, and why if before its last step."""

    state: TrainState
    step: int
    stopped: Stop | None


class OpenStep(NamedTuple):
    """A step that the devices were given and that was not looked at since."""

    n: int
    step: Step
    result: StepResult


def train(loop: Loop, state: TrainState, reference: Reference, first: int, progress: Progress) -> Ended:
    """Run steps first + 1 to num_steps, or to where the run's control of itself ends it.

    After each step, in this order: its line is logged, it is evaluated, saved, and the reference moves; each where it
    is due. A step is looked at, and its line written, while the next one runs, so the device never waits for the host;
    unless something is to happen between the two. Raises UserError at a step whose loss, gradient or update is not
    finite, and SystemExit after a checkpoint when SIGTERM asks for it.
    """
    watch = Watch(loop.control)
    for known in loop.records:
        watch.see(int(known["step"] or 0), known)
    if (loop.evaluates_at(first) or (watch.stop and loop.evaluate)) and not is_evaluated(loop.records, first):
        line = evaluate(loop, state, progress)
        record(loop, first, line, progress)
        loop.checkpoints.learn(first, line)
        watch.see(first, line)
    if first == loop.num_steps or watch.stop is not None:
        return ended(loop, state, first, watch)
    open_steps: list[OpenStep] = []
    window: list[Metrics] = []
    batches: Iterator[Step] = iter(())
    shapes: set[tuple[tuple[int, ...], ...]] = set()
    n = first
    clock = Clock(progress)

    with processes.stop_signal() as asked, console.progress("training", loop.num_steps, "step", completed=first) as bar:

        def settle(steady: bool = True) -> tuple[int, Record]:
            """Look at the first open step: its number, and its line if it has one."""
            n, step, result = open_steps.pop(0)
            check_finite(loop, n, step, result)
            progress.count(step, clock.lap(), loop.flops(step.batch) if steady else None)
            window.append(result.metrics)
            line: Record = {}
            if loop.logs_at(n):
                with progress.timed("log"):
                    merge(progress, window)
                    window.clear()
                    line = training_record(loop, n, result, progress)
                    progress.window.clear()
                    bar.describe(f"loss {line['loss']:.4f}" if line["loss"] is not None else "")
                    watch.see(n, line)
            return n, line

        for n in range(first + 1, loop.num_steps + 1):
            if loop.syncs_after(n - 1):
                reference = move(loop, state, reference, n - 1, progress)
                clock.start()
            if n == first + 1 or loop.syncs_after(n - 1):
                # Batches are made ahead of time: these end where the reference moves, so that none is made too early.
                batches = loop.batches(n - 1, loop.window_end(n - 1), reference.train)
            with progress.timed("wait"):
                step = next(batches)
            shape = tuple(np.shape(field) for field in step.batch)
            compiles = shape not in shapes
            shapes.add(shape)
            with jax.transfer_guard("disallow"):
                state, result = loop.step(state, loop.put(step.batch))
            open_steps.append(OpenStep(n, step, result))
            bar.advance()
            line: Record = {}
            # What is compiled is no time of the next step, and none of the one before.
            while len(open_steps) > (0 if compiles else 1):
                before, line = settle(steady=not compiles)
                if before < n:
                    record(loop, before, line, progress)
            terminating = asked()
            if not (terminating or loop.pauses_at(n)):
                if not open_steps:
                    record(loop, n, line, progress)
                continue
            if open_steps:
                _, line = settle()
            with progress.timed("log"):
                # The window may be open still: a checkpoint holds it, for the run that goes on from there.
                merge(progress, window)
                window.clear()
            # Whoever sent SIGTERM may not wait for an evaluation; a resumed run makes up for it.
            if (loop.evaluates_at(n) or (watch.stop and loop.evaluate)) and not terminating:
                held_out = evaluate(loop, state, progress)
                watch.see(n, held_out)
                line |= held_out
                terminating = asked()
            record(loop, n, line, progress)
            if loop.saves_at(n) or terminating or watch.stop is not None:
                with progress.timed("checkpoint"):
                    # What a checkpoint goes on from lasts before it does.
                    for sink in loop.sinks:
                        sink.flush()
                    held = checkpointed(state, reference if loop.sync is not None else None)
                    loop.checkpoints.save(n, held, asdict(progress), line)
            if terminating:
                loop.checkpoints.wait()
                console.say(
                    f"SIGTERM: saved step {n} in {loop.checkpoints.path(n)}; the same command goes on from there."
                )
                raise SystemExit(TERMINATED)
            if watch.stop is not None:
                break
            clock.start()
        with progress.timed("checkpoint"):
            loop.checkpoints.wait()
        if asked():
            raise SystemExit(TERMINATED)
    return ended(loop, state, n, watch)


def ended(loop: Loop, state: TrainState, n: int, watch: Watch) -> Ended:
    """A stop that comes with the last step is none."""
    stopped = watch.stop if n < loop.num_steps else None
    if stopped is not None:
        console.say(f"stopped after step {n} of {loop.num_steps}: {stopped.reason}")
    return Ended(state, n, stopped)


def move(loop: Loop, state: TrainState, reference: Reference, n: int, progress: Progress) -> Reference:
    """The reference after step n, for the steps until it moves again."""
    assert loop.sync is not None
    with progress.timed("sync"):
        return loop.sync(reference, state.decoder, n, loop.window_end(n))


def is_evaluated(records: Sequence[Record], n: int) -> bool:
    return any(r["step"] == n and any(name.startswith(PREFIX) for name in r) for r in records)


def count_places(batch: HostBatch) -> tuple[int, int]:
    """Tokens in the rows that a step computes, and places in those rows."""
    segments = np.asarray(batch.segments)[: int(batch.num_microbatches)]
    return int(np.count_nonzero(segments)), segments.size


def merge(progress: Progress, window: Sequence[Metrics]) -> None:
    """Add a list of metrics on the device to the open window on the host."""
    progress.window = {name: [*sums] for name, sums in total(window, open_window(progress)).items()}


def open_window(progress: Progress) -> dict[str, Total]:
    return {name: Total(*pair) for name, pair in progress.window.items()}


def training_record(loop: Loop, n: int, result: StepResult, progress: Progress) -> Record:
    """The line of a logged step: means since the last one, and the state of the run."""
    return {
        **means(open_window(progress)),
        "grad_norm": float(jax.device_get(result.grad_norm)),
        "learning_rate": float(np.asarray(loop.learning_rate(n - 1))),
        "epoch": n / loop.steps_per_epoch,
        "num_tokens": progress.tokens,
        **logged(loop.control, result.carry),
        **speed(progress.rates(), loop.peak_flops),
    }


def speed(rates: Record, peak_flops: float | None) -> Record:
    """`rates` and, where the devices' peak is known, `mfu`: the share of it that went into useful arithmetic."""
    done = rates["tflops_per_s"]
    return rates if peak_flops is None or done is None else {**rates, "mfu": 1e12 * done / peak_flops}


def evaluate(loop: Loop, state: TrainState, progress: Progress) -> Record:
    """Held-out metrics. Raises UserError if one that the config names is not among them: before a step is in vain."""
    assert loop.evaluate is not None
    with progress.timed("evaluate"):
        line = loop.evaluate(state.decoder, state.carry)
    stop = loop.control.early_stop
    named = {"training.best_metric": loop.config.best_metric, "control.early_stop.metric": stop and stop.metric}
    for key, metric in named.items():
        if metric is not None and metric not in line:
            raise UserError(f"{key} is {metric!r}; this run's evaluation gives {', '.join(sorted(line))}.")
    return line


def record(loop: Loop, n: int, line: Record, progress: Progress) -> None:
    with progress.timed("log"):
        if line:
            progress.log(n, line)
            for sink in loop.sinks:
                sink.write(n, line)


def check_finite(loop: Loop, n: int, step: Step, result: StepResult) -> None:
    """Raise UserError if the loss, gradient or update of step n is not finite; its state is in no checkpoint yet."""
    finite, loss = jax.device_get((result.finite, result.metrics["loss"]))
    if finite:
        return
    grad_norm, update_norm = jax.device_get((result.grad_norm, result.update_norm))
    ids = [loop.example_id(i) for i in step.examples]
    details = loop.folder / "nonfinite.json"
    found = {
        "step": n,
        "loss": str(loss.sum / loss.weight),
        "grad_norm": str(grad_norm),
        "update_norm": str(update_norm),
        "examples": ids,
    }
    if processes.is_first():
        atomic.write_text(details, json.dumps(found, indent=1, ensure_ascii=False))
    loop.checkpoints.wait()
    last = loop.checkpoints.latest()
    good = (
        f"The last good checkpoint is {loop.checkpoints.path(last)}"
        if last is not None
        else "No checkpoint was saved yet"
    )
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    raise UserError(
        f"step {n} gave a loss of {found['loss']}, a gradient of norm {grad_norm} and an update of norm {update_norm}: "
        f"expected finite numbers. Its examples are {shown} (all of them in {details}). {good}. Look at those "
        "examples, or start in another output_dir with a lower optimizer.learning_rate or training.max_grad_norm."
    )
