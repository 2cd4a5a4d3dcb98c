"""The course of a run: from a config to a Hugging Face folder, and the other commands of the command line."""

import dataclasses
import json
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpo import atomic, compiler, console, origin, processes, run_folder
from jaxpo.config import Run
from jaxpo.config_checks import too_late
from jaxpo.conversion import of_same_shape, started
from jaxpo.data import inspect, loader
from jaxpo.delivery import deliver, end_ids
from jaxpo.errors import UserError
from jaxpo.evaluation import plots, report
from jaxpo.models.decoder import Decoder, DecoderConfig, abstract_decoder
from jaxpo.models.generate import greedy
from jaxpo.prepare import (
    STAGES,
    Parts,
    advise_weights,
    at_stage,
    check_examples,
    learns_rewards,
    prepare,
    stage_of,
)
from jaxpo.references import References, is_averaged, reference_logps, reference_weights, references
from jaxpo.run_folder import EXPORT, SUMMARY, claim, read_samples, write_samples
from jaxpo.training import loop, metrics
from jaxpo.training.checkpoint import Checkpoints, latest_step, restore_decoder
from jaxpo.training.control import Control, Stop
from jaxpo.training.evaluate import PREFIX, make_evaluation
from jaxpo.training.flops import step_flops
from jaxpo.training.loop import Loop, Progress
from jaxpo.training.mesh import Layout
from jaxpo.training.metrics import Record
from jaxpo.training.moving_reference import Reference, Sync, checkpointed, restored
from jaxpo.training.offload import in_host_memory
from jaxpo.training.optimizer import learning_rate, make_optimizer
from jaxpo.training.step import TrainState, initial_carry, make_evaluation_step, make_train_step


def train(run: Run, where: processes.Place | None = None, resume: str = "auto") -> Path:
    """Do the stages of a run that are not done yet, then the run itself; returns its folder.

    resume: where it begins, see `origin.chosen`. where: this process's place among those that train together, if
    it is not alone and no scheduler tells.
    """
    # XLA reads what it is told of kernels once, so all stages get those that one of them needs.
    dtypes = {one.model.compute_dtype for one in (run, *run.stages.values())}
    compiler.set_up("bfloat16" if "bfloat16" in dtypes else "float32")
    folder = place_of(run)
    with together(where), ExitStack() as claimed:
        for one in (*run.stages.values(), run):
            metrics.check_installed(one.logging)
        other = origin.chosen(folder, run, resume) if processes.is_first() else None
        claimed.enter_context(claim(folder, run))
        if other is not None:
            origin.adopt(other, resume, folder)
        processes.wait(f"begin {folder}")
        for name, stage in run.stages.items():
            place = folder / STAGES / name
            console.rule(f"stage {name}")
            resolved = dataclasses.replace(at_stage(stage, folder), output_dir=place)
            with claim(place, resolved):
                train_one(resolved, place)
        if run.stages:
            console.rule(run.objective.name)
        train_one(at_stage(run, folder), folder)
    return folder


@contextmanager
def together(where: processes.Place | None) -> Iterator[None]:
    """One of several processes, of which the first one speaks."""
    with processes.joined(where):
        if not processes.is_first():
            console.silence()
        yield


def fill_reference(run: Run, where: processes.Place | None = None) -> None:
    """Compute and store the reference log-probs that `train` with this config would need."""
    if not run.objective.uses_reference:
        raise UserError(
            f"objective.name is {run.objective.name}, which uses no reference model: there is nothing to fill."
        )
    compiler.set_up(run.model.compute_dtype)
    folder = place_of(run)
    with together(where), claim(folder, run):
        parts = prepare(started(at_stage(run, folder), folder), folder)
        check_examples(parts)
        table = references(parts, cache(lambda: parts.load(parts.checkpoint)))
    console.say(f"reference log-probs of completions: {table.computed} computed, {table.reused} reused")


def inspect_data(run: Run, stage: str | None, split: str, examples: int) -> None:
    """Print what the trainer will see of data.train or data.eval, of the run or of one of its stages."""
    compiler.set_up(run.model.compute_dtype)
    one = of_same_shape(run if stage is None else stage_of(run, stage), place_of(run))
    # A model from scratch is made for the tokenizer's sake; the run's own folder is the trainer's to write.
    with TemporaryDirectory() as folder:
        parts = prepare(one, Path(folder))
        corpus = parts.train if split == "train" else parts.eval
        if corpus is None:
            raise UserError("data.eval is empty, so there is nothing to show of it; expected a source in it.")
        if split == "train":
            advise_weights(one, corpus)
        for source in corpus.sources:
            inspect.show_summary(source)
            fill = inspect.packing_fill(source, parts.packing, one.training.batch_size)
            inspect.show_fill(fill, parts.packing, one.training.batch_size)
            for i in range(min(examples, len(source))):
                inspect.show_example(source[i], parts.tokenizer, source.feedback)


def place_of(run: Run) -> Path:
    assert run.output_dir is not None
    return run.output_dir.expanduser()


def train_one(run: Run, folder: Path) -> None:
    """One run in its folder, which is claimed: from the start or from its last checkpoint."""
    if processes.same((folder / SUMMARY).exists):
        console.say(f"{folder} holds a finished run; nothing to do. Its weights are in {folder / EXPORT}.")
        return
    progress = Progress()
    with progress.timed("data"):
        run = started(run, folder)
        parts = prepare(run, folder)
        check_examples(parts)
        advise_weights(run, parts.train)
        run_folder.check_same_inputs(folder, parts, resumed=latest_step(folder) is not None)
        if processes.is_first():
            write_dropped(parts, folder)
    with Checkpoints(folder, run.training) as checkpoints:
        trained = course(parts, folder, checkpoints, progress)
        finish(parts, folder, checkpoints, trained)


class Trained(NamedTuple):
    """What came of a run: its last weights, after which step, why not later, and its course in figures."""

    decoder: Decoder
    step: int
    stopped: Stop | None
    progress: Progress
    references: References


def course(parts: Parts, folder: Path, checkpoints: Checkpoints, progress: Progress) -> Trained:
    """The reference table, then training, from the start or from the last checkpoint."""
    run, config, training = parts.run, parts.checkpoint.decoder_config, parts.run.training
    epoch = len(loader.epoch_order(parts.train, run.data.shuffle, training.seed))
    steps = loader.num_steps(epoch, training.batch_size, training.num_epochs, training.max_steps)
    if training.max_steps is not None and steps < training.max_steps:
        console.say(
            f"training.num_epochs {training.num_epochs} is over after {steps} steps, before training.max_steps "
            f"{training.max_steps}"
        )
    for key, text in too_late(run, steps, f"the {steps} steps of the run"):
        raise UserError(f"{key} {text}.")
    optimizer = make_optimizer(run.optimizer, config, steps, training.max_grad_norm, run.model.dtype)
    first = processes.same(checkpoints.latest) or 0
    loaded: list[Decoder] = []

    def initial() -> Decoder:
        if not loaded:
            with progress.timed("load"):
                loaded.append(parts.load(parts.checkpoint))
        return loaded[0]

    with progress.timed("reference"):
        table = references(parts, initial)
    control = Control(run.control.adaptive_beta)
    abstract = abstract_state(run, config, parts.layout, optimizer, control)
    sync = make_sync(parts)
    # A resumed run makes up for answers whose file was moved away.
    if not first or processes.same(lambda: "before" not in read_samples(folder)):
        with progress.timed("samples"):
            sample(parts, folder, initial, "before")
    if first:
        loaded.clear()
        at_start = Reference(table.train, abstract.decoder if is_averaged(run) else None)
        held = checkpointed(abstract, None if sync is None else at_start)
        content, saved = checkpoints.restore(first, held)
        state, moved = restored(content)
        reference = at_start if moved is None else moved
        progress = progress.after(Progress(**saved))
        console.say(f"going on from step {first} of {steps}, saved in {checkpoints.path(first)}")
    else:
        reference = Reference(table.train, reference_weights(parts, initial))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.optimizer)
        # The list gives its reference up: no second copy of the weights may live on while they are trained.
        state = TrainState(
            step=jax.device_put(np.int32(0), abstract.step.sharding),
            optimizer=jax.jit(optimizer.init, out_shardings=shardings)(initial()),
            decoder=loaded.pop(),
            carry={
                name: jax.device_put(np.float32(value), abstract.carry[name].sharding)
                for name, value in initial_carry(run.objective, control).items()
            },
        )
    evaluate = None
    if parts.eval is not None:
        step = jax.jit(make_evaluation_step(run.objective, parts.scorer))
        evaluate = make_evaluation(parts.eval, table.eval, parts.packing, training.batch_size, step, parts.put)
    # What the last process wrote after its last checkpoint is taken away before it is read.
    sinks = metrics.open_sinks(run, folder, first, progress.known) if processes.is_first() else []
    records = processes.same(lambda: metrics.read(folder))
    progress.go_on_after(records)
    work = Loop(
        config=training,
        control=run.control,
        folder=folder,
        records=records,
        num_steps=steps,
        log_every=run.logging.every,
        steps_per_epoch=epoch / training.batch_size,
        step=jax.jit(make_train_step(run.objective, parts.scorer, optimizer, control), donate_argnums=0),
        put=parts.put,
        batches=lambda start, end, known: loader.steps(
            parts.train,
            known,
            parts.packing,
            batch_size=training.batch_size,
            num_epochs=training.num_epochs,
            shuffle=run.data.shuffle,
            seed=training.seed,
            first=start,
            last=end,
        ),
        example_id=lambda i: parts.train[i].id,
        evaluate=evaluate,
        sync=sync,
        learning_rate=learning_rate(run.optimizer, steps),
        flops=partial(step_flops, config),
        peak_flops=parts.layout.peak_flops,
        checkpoints=checkpoints,
        sinks=sinks,
    )
    try:
        ended = loop.train(work, state, reference, first, progress)
    finally:
        for sink in sinks:
            sink.close()
    return Trained(ended.state.decoder, ended.step, ended.stopped, progress, table)


def make_sync(parts: Parts) -> Sync | None:
    """How the reference of a run moves, if it does."""
    run, training = parts.run, parts.run.training
    if run.reference.sync_steps is None:
        return None
    order = loader.batches(parts.train, training.batch_size, training.num_epochs, run.data.shuffle, training.seed)
    return Sync(
        steps=run.reference.sync_steps,
        alpha=run.reference.mixup_alpha,
        examples=lambda first, last: sorted({i for n in range(first, last) for i in order[n] or ()}),
        score=lambda decoder, rows: reference_logps(parts, decoder, parts.train)(rows),
        chunk=training.batch_size,
    )


def abstract_state(
    run: Run, config: DecoderConfig, layout: Layout, optimizer: optax.GradientTransformation, control: Control
) -> TrainState:
    """Shapes, dtypes and shardings of the training state."""

    def start(decoder: Any) -> TrainState:
        carry = {name: jnp.float32(value) for name, value in initial_carry(run.objective, control).items()}
        return TrainState(jnp.zeros((), jnp.int32), decoder, optimizer.init(decoder), carry)

    state = layout.place(config, jax.eval_shape(start, abstract_decoder(config, run.model.dtype)))
    return state._replace(optimizer=in_host_memory(state.optimizer)) if run.optimizer.offload else state


def sample(parts: Parts, folder: Path, decoder: Callable[[], Decoder], when: str) -> None:
    """Greedy answers to the first held-out prompts, into samples.json under `when`."""
    run = parts.run
    corpus = parts.eval or parts.train
    if learns_rewards(run):
        return
    prompts = [corpus[i].prompt for i in range(min(run.samples.prompts, len(corpus)))]
    if not prompts:
        return
    ends = end_ids(run, parts.checkpoint, parts.tokenizer)
    answers = greedy(decoder(), prompts, run.samples.max_new_tokens, ends, run.model.compute_dtype)
    if not processes.is_first():
        return
    so_far = read_samples(folder)
    so_far["prompts"] = [parts.tokenizer.decode(p) for p in prompts]
    so_far[when] = [parts.tokenizer.decode(a, skip_special_tokens=True) for a in answers]
    write_samples(folder, so_far)


def finish(parts: Parts, folder: Path, checkpoints: Checkpoints, trained: Trained) -> None:
    """Samples, plots, export, and last of all the summary, which marks the run as finished."""
    run, progress, stopped = parts.run, trained.progress, trained.stopped
    decoder, step = trained.decoder, trained.step
    best = processes.same(checkpoints.best) if run.export.checkpoint == "best" else step
    if best is None:
        console.warn(f"no evaluation gave a finite {run.training.best_metric}, so the last step is exported")
    elif best != step:
        console.say(f"exporting step {best}, the best by {run.training.best_metric}")
        decoder, step = restore_decoder(folder, best, jax.tree.map(abstract_of, decoder)), best
    before, after = held_out(checkpoints.metrics(0)), held_out(checkpoints.metrics(step))
    with progress.timed("samples"):
        sample(parts, folder, lambda: decoder, "after")
    if processes.is_first():
        with progress.timed("plots"):
            plots.write(metrics.read(folder), folder / "plots")
    with progress.timed("export"):
        deliver(run, parts.checkpoint, parts.tokenizer, decoder, folder / EXPORT, run.export.dtype)
    summary = {
        "objective": run.objective.name,
        "before": before,
        "after": after,
        "reference": {"computed": trained.references.computed, "reused": trained.references.reused},
        **loop.speed(progress.rates(), parts.layout.peak_flops),
        "peak_bytes": int(processes.each(peak_bytes()).max()),
        "dropped": dropped(parts),
        "truncated": truncated(parts),
        "steps": trained.step,
        "stopped": stopped and stopped._asdict(),
        "exported_step": step,
        "examples": progress.examples,
        "seconds": {stage: round(seconds, 3) for stage, seconds in sorted(progress.seconds.items())},
    }
    if processes.is_first():
        report.write_markdown(folder)
        # With this the run is finished: whatever is to be written comes before it.
        atomic.write_text(folder / SUMMARY, json.dumps(summary, indent=1))
        report.show(folder, summary)
    processes.wait(f"{folder} is finished")


def abstract_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def held_out(record: Record) -> Record:
    """An evaluation's metrics."""
    return {name: value for name, value in record.items() if name.startswith(PREFIX)}


def peak_bytes() -> int:
    """The most memory that was in use: of a device where it tells, else of this process on the host."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def dropped(parts: Parts) -> dict[str, int]:
    """Rows left out of training and evaluation, by reason."""
    return dict(sum((Counter(s.dropped) for c in parts.corpora for s in c.sources), Counter()))


def truncated(parts: Parts) -> dict[str, int]:
    """Prompts and completions that were cut."""
    return dict(sum((Counter(s.truncated) for c in parts.corpora for s in c.sources), Counter()))


def write_dropped(parts: Parts, folder: Path) -> None:
    """dropped.jsonl: every row that was left out, with the reason; and a line on the screen if there are any."""
    listings = [s.dropped_path.read_text(encoding="utf-8") for c in parts.corpora for s in c.sources]
    atomic.write_text(folder / "dropped.jsonl", "".join(listings))
    if counts := dropped(parts):
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
        console.say(f"{sum(counts.values())} rows dropped ({reasons}), listed in {folder / 'dropped.jsonl'}")
    cut = {what: n for what, n in truncated(parts).items() if n}
    if cut:
        console.say(f"cut to length: {', '.join(f'{n} {what}s' for what, n in cut.items())}")
