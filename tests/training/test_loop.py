"""The loop: what is logged, evaluated and saved when; stopping, resuming, and numbers that are not finite."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import Carry, DeviceBatch, Example, HostBatch
from jaxpo.config import ControlConfig, EarlyStop, OptimizerConfig, TrainingConfig
from jaxpo.data.loader import Step
from jaxpo.data.pack import Packing, pack
from jaxpo.errors import UserError
from jaxpo.models.decoder import Decoder
from jaxpo.objectives import DPO
from jaxpo.objectives.logprobs import Blocks
from jaxpo.objectives.score import Scorer
from jaxpo.training.checkpoint import Checkpoints
from jaxpo.training.control import Control
from jaxpo.training.flops import step_flops
from jaxpo.training.loop import TERMINATED, Ended, Loop, Progress, speed, train
from jaxpo.training.metrics import JsonLines, checksum, read
from jaxpo.training.moving_reference import Reference
from jaxpo.training.optimizer import learning_rate, make_optimizer
from jaxpo.training.step import StepResult, TrainState, initial_carry, make_train_step

PACKING = Packing(row_length=128, rows=2, microbatches=4)
STEPS, BATCH = 6, 4
TrainStep = Callable[[TrainState, DeviceBatch], tuple[TrainState, StepResult]]


def put(batch: HostBatch) -> DeviceBatch:
    return DeviceBatch(*map(jax.device_put, batch))


def optimizer(decoder: Decoder, rate: float) -> tuple[OptimizerConfig, Any]:
    config = OptimizerConfig(learning_rate=rate, schedule="linear")
    return config, make_optimizer(config, decoder.config, STEPS, 1.0)


def make_step(decoder: Decoder, rate: float) -> TrainStep:
    transform = optimizer(decoder, rate)[1]
    return jax.jit(
        make_train_step(DPO(), Scorer("float32", "none", Blocks((128,))), transform, Control()), donate_argnums=0
    )


@pytest.fixture(scope="module")
def step(small_decoder: Decoder) -> TrainStep:
    return make_step(small_decoder, 1e-3)


@dataclass
class Trial:
    """A run of six steps, one epoch, in a folder; it can be ended and begun again. Tests change what they need."""

    folder: Path
    decoder: Decoder
    examples: list[Example]
    step: TrainStep
    table: np.ndarray
    config: TrainingConfig
    control: ControlConfig = field(default_factory=ControlConfig)
    log_every: int = 2
    evaluations: list[int] = field(default_factory=list)
    evaluating: bool = True
    before_step: Callable[[int], None] = lambda n: None
    steps_made: list[int] = field(default_factory=list)

    def batches(self, first: int, last: int, references: np.ndarray | None) -> Iterator[Step]:
        assert references is not None
        for n in range(first, last):
            self.before_step(n + 1)
            self.steps_made.append(n + 1)
            chosen = list(range(n * BATCH, (n + 1) * BATCH))
            yield Step(chosen, pack([self.examples[i] for i in chosen], references[chosen], PACKING)[0])

    def start(self) -> TrainState:
        """The state before the first step."""
        _, transform = optimizer(self.decoder, 1e-3)
        weights = jax.tree.map(jnp.array, self.decoder)
        carry = {name: jax.device_put(np.float32(value)) for name, value in initial_carry(DPO(), Control()).items()}
        return TrainState(jax.device_put(np.int32(0)), weights, jax.jit(transform.init)(weights), carry)

    def run(self) -> Ended:
        """From the start or from the last checkpoint, as a process does."""
        settings, _ = optimizer(self.decoder, 1e-3)
        state = self.start()
        progress = Progress()
        self.steps_made.clear()
        with Checkpoints(self.folder, self.config) as checkpoints:
            first = checkpoints.latest() or 0
            if first:
                state, saved = checkpoints.restore(first, state)
                progress = Progress(**saved)
            sink = JsonLines(self.folder, first, progress.known)

            def evaluate(decoder: Decoder, carry: Carry) -> dict[str, Any]:
                self.evaluations.append(1)
                return {"eval_norm": float(jnp.square(decoder.embedding[...]).sum())}

            loop = Loop(
                config=self.config,
                control=self.control,
                folder=self.folder,
                records=read(self.folder),
                num_steps=STEPS,
                log_every=self.log_every,
                steps_per_epoch=STEPS,
                step=self.step,
                put=put,
                batches=self.batches,
                example_id=lambda i: self.examples[i].id,
                evaluate=evaluate if self.evaluating else None,
                sync=None,
                learning_rate=learning_rate(settings, STEPS),
                flops=partial(step_flops, state.decoder.config),
                peak_flops=None,
                checkpoints=checkpoints,
                sinks=[sink],
            )
            try:
                return train(loop, state, Reference(self.table), first, progress)
            finally:
                sink.close()

    @property
    def saved(self) -> list[int]:
        return sorted(int(p.name) for p in (self.folder / "checkpoints").iterdir() if p.name.isdecimal())


@pytest.fixture
def trial(tmp_path: Path, small_decoder: Decoder, pairs: list[Example], step: TrainStep) -> Trial:
    examples = [*pairs, *pairs[:8]]
    table = np.random.default_rng(1).normal(-60, 5, (len(examples), 1, 2)).astype(np.float32)
    return Trial(tmp_path, small_decoder, examples, step, table, TrainingConfig(eval_every=3, save_every=2))


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [dict(record) for record in read(folder)]


def by_step(folder: Path) -> dict[int, dict[str, Any]]:
    """What is known of each step, without what depends on the clock."""
    known: dict[int, dict[str, Any]] = {}
    for record in lines(folder):
        steady = {name: value for name, value in record.items() if not name.endswith("_per_s")}
        known[record["step"]] = {**known.get(record["step"], {}), **steady}
    return known


def test_what_happens_when(trial: Trial) -> None:
    """Logged every 2 steps, evaluated every 3 and before and after, saved every 2 and at the end."""
    ended = trial.run()
    records = lines(trial.folder)
    assert [r["step"] for r in records] == [0, 2, 3, 4, 6]
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6]
    assert [r["step"] for r in records if "eval_norm" in r] == [0, 3, 6]
    assert len(trial.evaluations) == 3
    assert trial.saved == [2, 4, 6]
    assert int(ended.state.step) == ended.step == STEPS
    assert ended.stopped is None
    logged = [r for r in records if "loss" in r]
    # The rate that step n was made with, of a straight line from 1e-3 to 0 in 6 steps.
    assert [r["learning_rate"] for r in logged] == pytest.approx([1e-3 * (1 - (n - 1) / 6) for n in (2, 4, 6)])
    assert [r["epoch"] for r in logged] == [2 / 6, 4 / 6, 1.0]
    assert all(r["grad_norm"] > 0 and r["pairs_per_s"] > 0 and 0 < r["padding_fraction"] < 1 for r in logged)


def test_a_logged_line_is_the_mean_over_the_steps_since_the_last(trial: Trial, tmp_path: Path) -> None:
    trial.run()
    every = replace(trial, folder=tmp_path / "every", log_every=1)
    every.folder.mkdir()
    every.run()
    singles = {r["step"]: r for r in lines(every.folder) if "loss" in r}
    for record in (r for r in lines(trial.folder) if "loss" in r):
        n = record["step"]
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert record[name] == pytest.approx((singles[n - 1][name] + singles[n][name]) / 2, rel=1e-5)


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_sigterm_saves_and_exits_and_the_same_command_goes_on(trial: Trial, tmp_path: Path, at: int) -> None:
    """The signal comes while step `at` is prepared; ended and resumed, the run equals a whole one bit for bit."""
    whole = replace(trial, folder=tmp_path / "whole")
    whole.folder.mkdir()
    expected = whole.run().state

    ended = replace(trial, before_step=lambda n: kills(n, at))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        ended.run()
    assert caught.value.code == TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert trial.saved[-1] == at
    assert same_bits(trial.run().state, expected)
    assert by_step(trial.folder) == by_step(whole.folder)


def test_sigterm_does_not_wait_for_an_evaluation(trial: Trial) -> None:
    """Step 3 is to be evaluated; the run that goes on makes up for it, once."""
    ended = replace(trial, before_step=lambda n: kills(n, 3))
    with pytest.raises(SystemExit):
        ended.run()
    assert [n for n, known in by_step(trial.folder).items() if "eval_norm" in known] == [0]
    trial.evaluations.clear()
    trial.run()
    assert len(trial.evaluations) == 2
    assert [n for n, known in by_step(trial.folder).items() if "eval_norm" in known] == [0, 3, 6]


def test_a_run_that_is_resumed_after_its_last_step_changes_nothing(trial: Trial) -> None:
    expected, records = trial.run().state, lines(trial.folder)
    assert same_bits(trial.run().state, expected)
    assert lines(trial.folder) == records


@pytest.mark.parametrize("rate", [None, 1e30], ids=["poisoned reference", "huge learning rate"])
def test_a_loss_that_is_not_finite_ends_the_run(trial: Trial, small_decoder: Decoder, rate: float | None) -> None:
    """Poison: example 9, which step 3 sees. A huge rate: step 1 has a sane gradient, but the weights it makes are not:
    they may not be saved as the last good ones.
    """
    poisoned = trial.table.copy()
    if rate is None:
        poisoned[9, 0, 1] = np.nan
    config = replace(trial.config, save_every=1, eval_every=None)
    trial = replace(trial, table=poisoned, config=config, evaluating=False)
    if rate is not None:
        trial.step = make_step(small_decoder, rate)
    bad = 3 if rate is None else 1
    with pytest.raises(UserError) as caught:
        trial.run()
    text = str(caught.value)
    assert text.startswith(f"step {bad} gave a loss of ")
    chosen = [trial.examples[(bad - 1) * BATCH + i].id for i in range(BATCH)]
    assert f"Its examples are {', '.join(chosen)} (all of them in {trial.folder / 'nonfinite.json'})" in text
    if rate is None:
        assert f"The last good checkpoint is {trial.folder / 'checkpoints' / str(bad - 1)}." in text
    else:
        assert "an update of norm inf: expected finite numbers" in text
        assert "No checkpoint was saved yet." in text
    assert trial.saved == list(range(1, bad))
    details = json.loads((trial.folder / "nonfinite.json").read_text())
    assert details["step"] == bad
    assert details["examples"] == chosen


@pytest.mark.parametrize("bad", [1, 2, 3, 4, 5, 6])
def test_no_checkpoint_of_a_bad_state_is_written(trial: Trial, bad: int) -> None:
    """Wherever the bad step falls between two checkpoints, all that is saved is from before it."""
    trial.table[(bad - 1) * BATCH] = np.inf
    with pytest.raises(UserError, match=f"^step {bad} gave"):
        trial.run()
    assert all(n < bad for n in trial.saved)
    if bad <= 2:
        with pytest.raises(UserError, match="No checkpoint was saved yet"):
            trial.run()


@pytest.mark.parametrize("metric", ["best_metric", "early_stop"])
def test_a_metric_that_is_not_evaluated_is_told_before_the_first_step(trial: Trial, metric: str) -> None:
    seen: list[int] = []
    best = metric == "best_metric"
    config = replace(trial.config, best_metric="eval_accuracy" if best else None)
    control = ControlConfig() if best else ControlConfig(early_stop=EarlyStop(metric="eval_accuracy"))
    key = "training.best_metric" if best else "control.early_stop.metric"
    with pytest.raises(UserError, match=f"{key} is 'eval_accuracy'; this run's evaluation gives eval_norm"):
        replace(trial, config=config, control=control, before_step=seen.append).run()
    assert seen == []


def test_each_evaluated_step_is_saved_where_the_best_is_to_be_kept(trial: Trial) -> None:
    config = replace(trial.config, best_metric="eval_norm", best_mode="max", save_every=4, keep_checkpoints=1)
    replace(trial, config=config).run()
    norms = {r["step"]: r["eval_norm"] for r in lines(trial.folder) if "eval_norm" in r and r["step"]}
    assert trial.saved == sorted({max(norms, key=lambda n: norms[n]), 6})


def kills(n: int, wanted: int) -> None:
    if n == wanted:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def far(trial: Trial, tmp_path: Path) -> Trial:
    """A run that is to stop after step 4, the first whose smoothed distance, which only grows, is beyond max_kl."""
    whole = replace(trial, folder=tmp_path / "whole", control=ControlConfig(max_kl=1e9), log_every=1)
    whole.folder.mkdir()
    whole.run()
    distances = [r["kl/smoothed"] for r in lines(whole.folder) if "loss" in r]
    assert distances == sorted(distances)
    return replace(trial, control=ControlConfig(max_kl=(distances[2] + distances[3]) / 2), log_every=1)


def test_a_run_too_far_from_its_reference_ends_as_at_its_last_step(far: Trial, tmp_path: Path) -> None:
    """Evaluated and saved, though neither was due; begun again, it has nothing to do, and so it has in between."""
    config = replace(far.config, eval_every=None, save_every=None)
    far = replace(far, config=config)
    ended = far.run()
    assert ended.stopped is not None
    assert (ended.step, ended.stopped.step, int(ended.state.step)) == (4, 4, 4)
    assert ended.stopped.reason.startswith("kl/smoothed is ") and "more than control.max_kl, " in ended.stopped.reason
    records = lines(far.folder)
    assert [r["step"] for r in records if "eval_norm" in r] == [0, 4]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert far.saved == [4]

    evaluations = len(far.evaluations)
    again = far.run()
    assert (again.step, again.stopped) == (ended.step, ended.stopped)
    assert same_bits(again.state, ended.state)
    assert (far.steps_made, len(far.evaluations), lines(far.folder)) == ([], evaluations, records)


@pytest.mark.parametrize("at", [3, 4])
def test_a_stop_is_the_same_after_a_signal(far: Trial, tmp_path: Path, at: int) -> None:
    """At step 4 the signal comes with the decision: the evaluation is left out, and made up for without training."""
    whole = replace(far, folder=tmp_path / "stopped")
    whole.folder.mkdir()
    expected = whole.run()
    with pytest.raises(SystemExit):
        replace(far, before_step=lambda n: kills(n, at)).run()
    ended = far.run()
    assert (ended.step, ended.stopped) == (expected.step, expected.stopped)
    assert same_bits(ended.state, expected.state)
    assert by_step(far.folder) == by_step(whole.folder)
    assert far.steps_made == [4][at - 3 :]


def test_a_stop_that_was_decided_but_not_saved_is_decided_again(far: Trial) -> None:
    """Killed after metrics.jsonl had the line of the step, before its checkpoint was whole."""
    expected = far.run()
    records = by_step(far.folder)
    shutil.rmtree(far.folder / "checkpoints" / "4")
    ended = far.run()
    assert far.steps_made == [3, 4]
    assert (ended.step, ended.stopped) == (expected.step, expected.stopped)
    assert same_bits(ended.state, expected.state)
    assert by_step(far.folder) == records


def test_a_distance_between_two_lines_is_seen_at_the_next(far: Trial) -> None:
    assert replace(far, log_every=3).run().step == STEPS
    assert lines(far.folder)[-1]["kl/smoothed"] > (far.control.max_kl or 0.0)


# No evaluation is ever better than the first by so much.
NEVER = EarlyStop(metric="eval_norm", mode="max", min_delta=1e9, patience=2)


def test_early_stop(trial: Trial) -> None:
    config = replace(trial.config, eval_every=2)
    trial = replace(trial, config=config, control=ControlConfig(early_stop=NEVER))
    ended = trial.run()
    assert ended.stopped is not None
    assert (ended.step, ended.stopped.step) == (4, 4)
    assert ended.stopped.reason.startswith("eval_norm was no better for 2 evaluations in a row; its best is ")
    assert [r["step"] for r in lines(trial.folder) if "eval_norm" in r] == [0, 2, 4]
    assert trial.saved == [2, 4]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_early_stop_counts_on_where_it_was(trial: Trial, tmp_path: Path, at: int) -> None:
    """A signal at an evaluated step leaves its evaluation to the run that goes on, which may stop right there."""
    trial = replace(trial, config=replace(trial.config, eval_every=2), control=ControlConfig(early_stop=NEVER))
    whole = replace(trial, folder=tmp_path / "whole")
    whole.folder.mkdir()
    expected = whole.run()
    with pytest.raises(SystemExit):
        replace(trial, before_step=lambda n: kills(n, at)).run()
    ended = trial.run()
    assert (ended.step, ended.stopped) == (expected.step, expected.stopped)
    assert same_bits(ended.state, expected.state)
    assert by_step(trial.folder) == by_step(whole.folder)
    assert trial.steps_made == list(range(at + 1, 5))


def test_a_stop_at_the_last_step_is_none(trial: Trial) -> None:
    ended = replace(trial, control=ControlConfig(early_stop=NEVER)).run()
    assert (ended.step, ended.stopped) == (STEPS, None)


def test_a_step_evaluated_after_a_signal_can_be_the_best(trial: Trial, tmp_path: Path) -> None:
    """The checkpoint of step 3 is written without its evaluation, which comes when the run goes on."""
    whole = replace(trial, folder=tmp_path / "whole")
    whole.folder.mkdir()
    whole.run()
    norms = {n: known["eval_norm"] for n, known in by_step(whole.folder).items() if "eval_norm" in known}
    mode = "max" if norms[3] > norms[6] else "min"
    best = {"best_metric": "eval_norm", "best_mode": mode, "save_every": None, "keep_checkpoints": 1}
    trial = replace(trial, config=replace(trial.config, **best))
    for at in (3, 5):
        with pytest.raises(SystemExit):
            replace(trial, before_step=lambda n, at=at: kills(n, at)).run()
    assert trial.saved == [3, 5]
    trial.run()
    assert trial.saved == [3, 6]
    with Checkpoints(trial.folder, trial.config) as checkpoints:
        checkpoints.restore(6, trial.start())
        assert checkpoints.best() == 3


def test_a_checkpoint_knows_the_lines_before_it(trial: Trial) -> None:
    """Logged every 2 steps, evaluated every 3, saved every 3: after step 3 there are lines of steps 0, 2 and 3."""
    saving = replace(trial, config=TrainingConfig(eval_every=3, save_every=3))
    saving.run()
    with Checkpoints(trial.folder, trial.config) as checkpoints:
        for step, count in ((3, 3), (6, 5)):
            progress = Progress(**checkpoints.restore(step, saving.start())[1])
            written = [r for r in lines(trial.folder) if r["step"] <= step]
            assert (progress.lines, progress.line) == (count, written[-1]) == (len(written), written[-1])
            assert progress.checksum_before == checksum(written[:-1])


def test_progress_comes_back_from_json_as_it_was() -> None:
    progress = Progress(
        examples=3,
        tokens=1 << 40,
        places=1 << 41,
        steady_seconds=0.1 + 0.2,
        seconds={"train": 1 / 3, "data": 2.0},
        window={"loss": [1.1, 3.0]},
        lines=2,
        line={"step": 2, "loss": 1 / 3, "eval_loss": None},
        checksum_before=7,
    )
    assert Progress(**json.loads(json.dumps(asdict(progress)))) == progress


def test_progress_of_a_resumed_run_adds_its_seconds() -> None:
    earlier = Progress(examples=8, tokens=90, places=100, seconds={"train": 2.0, "load": 1.0})
    now = Progress(seconds={"load": 0.5, "data": 0.25})
    after = now.after(earlier)
    assert after == replace(earlier, seconds={"train": 2.0, "load": 1.5, "data": 0.25})
    assert after.padding == pytest.approx(0.1)
    nothing = {"pairs_per_s": None, "tokens_per_s": None, "tflops_per_s": None, "padding_fraction": None}
    assert Progress().rates() == speed(Progress().rates(), 1e12) == nothing


def test_rates_are_per_second_of_steady_training() -> None:
    progress = Progress(
        tokens=50, places=200, steady_examples=30, steady_tokens=900, steady_flops=6e12, steady_seconds=1.5
    )
    rates = {"pairs_per_s": 20.0, "tokens_per_s": 600.0, "tflops_per_s": 4.0, "padding_fraction": 0.75}
    assert progress.rates() == speed(progress.rates(), None) == rates
    assert speed(progress.rates(), 16e12) == {**rates, "mfu": 0.25}


def test_a_stage_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.5, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    progress = Progress(seconds={"load": 4.0})
    with progress.timed("reference"), progress.timed("load"):
        pass
    assert progress.seconds == {"load": 6.5, "reference": 7.5}
