"""What is wrong with a configuration whose types are right: the checks between its keys, and of the paths in it."""

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import starmap
from pathlib import Path
from typing import NamedTuple

from jaxpo.batch import Mode, direction
from jaxpo.config import STAGE, Run, SamplesConfig


class Mistake(NamedTuple):
    """What is wrong with a configuration whose types are right: the key, as a path, and the message, which names it."""

    path: tuple[str | int, ...]
    text: str


def check(run: Run) -> list[Mistake]:
    """The mistakes that only show between keys, in the order of the keys; none means that the run makes sense."""
    mistakes = [] if run.output_dir else [Mistake((), "output_dir is missing; expected the folder to put the run into")]
    earlier: list[str] = []
    for name, stage in run.stages.items():
        place = ("stages", name)
        if not re.fullmatch(r"[\w-]+", name):
            mistakes.append(
                Mistake(place, f"stages: the name {name!r} becomes a folder; expected letters, digits, _ and - only")
            )
        if stage.stages:
            mistakes.append(Mistake((*place, "stages"), f"stages.{name}.stages: a stage cannot have stages of its own"))
        if stage.output_dir is not None:
            text = f"stages.{name}.output_dir: a stage has its place, OUTPUT_DIR/stages/{name}; leave this key out"
            mistakes.append(Mistake((*place, "output_dir"), text))
        mistakes += _check_single(stage, place, earlier)
        earlier.append(name)
    return [*mistakes, *_check_single(run, (), earlier)]


def paths(run: Run) -> dict[str, str]:
    """What a run's keys name on disk, or may name there, by key; of its stages nothing."""
    sources = {"train": run.data.train, "eval": run.data.eval}
    named = {
        "output_dir": run.output_dir,
        "model.path": run.model.path,
        **{f"data.{split}.{i}.path": one.path for split, listed in sources.items() for i, one in enumerate(listed)},
        "data.chat_template": run.data.chat_template,
        "data.cache_dir": run.data.cache_dir,
        "reference.cache_dir": run.reference.cache_dir,
        "reference.path": run.reference.path,
    }
    return {key: str(path) for key, path in named.items() if path is not None}


def path_problem(path: str) -> str | None:
    """Why no file system takes a path, as a message that follows its key; None if it may be one."""
    shown = path if len(path) <= 60 else f"{path[:57]}…"
    if re.match(r"\w\w+:/", path):
        # As a path it would be a folder of that name, here.
        return f'is "{shown}", an address; expected a folder that every host sees, such as a bucket that is mounted'
    try:
        parts = Path(path).expanduser().parts
    except RuntimeError:
        return f'is "{shown}", the home of a user whom this machine does not know; expected a path'
    if max(map(len, map(os.fsencode, parts)), default=0) > 255:
        return f'is "{shown}", which is too long for the name of a file; expected a path'
    return None


def too_late(run: Run, steps: int, limit: str) -> Iterator[tuple[str, str]]:
    """The keys of what would first act when the run's steps are over, which messages call `limit`; and what to say."""
    expected = f"expected less than {limit}"
    warmup, sync, every = run.optimizer.warmup_steps, run.reference.sync_steps, run.training.eval_every
    if warmup is not None and warmup >= steps:
        yield "optimizer.warmup_steps", f"is {warmup}; {expected}: the warmup would never end"
    if sync is not None and sync >= steps:
        yield "reference.sync_steps", f"is {sync}; {expected}: the reference would never move"
    if run.control.max_kl is not None and (logged := run.logging.every) >= steps:
        text = f"is looked at every {logged} steps (logging.every); {expected}: it would never end the run"
        yield "control.max_kl", text
    if (stop := run.control.early_stop) is not None and every is not None and stop.patience * every >= steps:
        text = f"ends no run before step {stop.patience * every}, patience * training.eval_every; {expected}"
        yield "control.early_stop", text


def _misjudged(keys: str, metric: str, mode: Mode | None) -> Iterator[tuple[str, str]]:
    """What is wrong with a metric to judge by and its mode, whose keys begin with `keys`: which key, what to say."""
    if not metric.startswith("eval_"):
        yield f"{keys}metric", f'is "{metric}"; expected a metric of the evaluation, such as eval_loss'
    elif direction(metric, mode) == 0:
        text = f'is missing, and the name "{metric}" does not say whether more or less of it is better; '
        yield f"{keys}mode", f"{text}expected min or max"
    elif direction(metric, mode) == -direction(metric):
        better, right = ("less", "min") if mode == "max" else ("more", "max")
        yield f"{keys}mode", f"is {mode}, but {better} of {metric} is better; expected {right}, or the key left out"


def _check_single(run: Run, place: tuple[str, ...], stages: list[str]) -> Iterator[Mistake]:
    """The mistakes within one run, which may start from `stages`; `place` is the path of the run itself."""

    def mistake(key: str, text: str) -> Mistake:
        path = (*place, *key.split("."))
        return Mistake(path, f"{'.'.join(path)} {text}")

    model, data, reference, training, optimizer = run.model, run.data, run.reference, run.training, run.optimizer
    for key, path in paths(run).items():
        if problem := path_problem(path):
            yield mistake(key, problem)
    if model.path is None and model.scratch is None:
        yield mistake("model", "has neither path nor scratch; expected one of them")
    if model.path is not None and model.scratch is not None:
        yield mistake("model.scratch", "stands beside model.path; expected one of them: a new model or an existing one")
    for key, path, revision in (
        ("model", model.path, model.revision),
        ("reference", reference.path, reference.revision),
    ):
        if path and path.startswith(STAGE) and path.removeprefix(STAGE) not in stages:
            known = ", ".join(STAGE + name for name in stages) or "another model, for there is none"
            yield mistake(f"{key}.path", f'is "{path}", which names no earlier stage; expected {known}')
        if revision and (path is None or path.startswith(STAGE)):
            yield mistake(f"{key}.revision", f"has no effect without a hub id in {key}.path; leave it out")
    if reference.path is not None and not run.objective.uses_reference:
        text = f"has no effect: the objective {run.objective.name} uses no reference model; leave it out"
        yield mistake("reference.path", text)
    if reference.sync_steps is not None and not run.objective.uses_reference:
        text = f"has no effect: the objective {run.objective.name} uses no reference model; leave it out"
        yield mistake("reference.sync_steps", text)
    if reference.sync_steps is None and reference.mixup_alpha != 1.0:
        yield mistake("reference.mixup_alpha", "has no effect without reference.sync_steps; set that, or leave it out")

    if reference.sync_steps is not None and reference.mixup_alpha != 1.0 and model.dtype != "float32":
        text = (
            f"is {reference.mixup_alpha:g}, an average of weights, which would be lost in the rounding of model.dtype "
        )
        yield mistake("reference.mixup_alpha", text + f"{model.dtype}; expected model.dtype float32, or 1")
    for key, value in (
        ("reference.sync_steps", reference.sync_steps),
        ("control.adaptive_beta", run.control.adaptive_beta),
    ):
        if value is not None and run.objective.initial_carry():
            text = f"moves what rewards are measured by, but {run.objective.name} takes their mean over the whole run; "
            yield mistake(key, text + "expected an objective without reward_shift, or this key left out")
    samples = SamplesConfig()
    if "rewards" in run.objective.statistics and run.samples not in (samples, replace(samples, prompts=0)):
        yield mistake("samples", "has no effect: a reward model writes no answers; leave it out")

    if not data.train:
        yield mistake("data.train", "is empty; expected a list of at least one source, such as {path: my-pairs.jsonl}")
    weighted = [source.weight is not None for source in data.train]
    if any(weighted) and not all(weighted):
        text = "is missing where other sources have one; expected a weight for all of data.train or for none"
        yield mistake(f"data.train.{weighted.index(False)}.weight", text)
    for i, source in enumerate(data.eval):
        if source.weight is not None:
            text = "has no effect: every example of data.eval is evaluated, once; leave it out"
            yield mistake(f"data.eval.{i}.weight", text)
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        text = f"is {data.max_prompt_length}; expected less than data.max_length, {data.max_length}, "
        yield mistake("data.max_prompt_length", text + "which has to hold a prompt and its completion")

    if data.max_prompt_length is None and data.truncate_prompt != "left":
        yield mistake("data.truncate_prompt", "has no effect without data.max_prompt_length; leave it out")

    if training.eval_every is not None and not data.eval:
        text = f"is {training.eval_every} but data.eval is empty; expected data to evaluate"
        yield mistake("training.eval_every", text)
    if training.best_metric is not None and not data.eval:
        yield mistake("training.best_metric", "needs an evaluation but data.eval is empty; expected data to evaluate")
    if training.best_metric is not None:
        yield from starmap(mistake, _misjudged("training.best_", training.best_metric, training.best_mode))
    elif training.best_mode is not None:
        yield mistake("training.best_mode", "has no effect without training.best_metric; leave it out")
    if run.export.checkpoint == "best" and training.best_metric is None:
        yield mistake("export.checkpoint", "is best but training.best_metric is not set; expected a metric to judge by")

    band, stop = run.control.adaptive_beta, run.control.early_stop
    for key, value in (("adaptive_beta", band), ("max_kl", run.control.max_kl)):
        if value is not None and not run.objective.uses_reference:
            text = f"needs a distance to a reference, but the objective {run.objective.name} uses none; leave it out"
            yield mistake(f"control.{key}", text)
    if band is not None and band.kl_low >= band.kl_high:
        text = f"is {band.kl_low:g}; expected less than control.adaptive_beta.kl_high, {band.kl_high:g}"
        yield mistake("control.adaptive_beta.kl_low", text)
    if stop is not None:
        yield from starmap(mistake, _misjudged("control.early_stop.", stop.metric, stop.mode))
    if stop is not None and not data.eval:
        yield mistake("control.early_stop", "needs evaluations but data.eval is empty; expected data to evaluate")
    if stop is not None and data.eval and training.eval_every is None:
        text = "needs evaluations on the way, but training.eval_every is not set; expected a number of steps there"
        yield mistake("control.early_stop", text)

    if training.max_steps is not None:
        limit = f"training.max_steps, {training.max_steps}"
        yield from starmap(mistake, too_late(run, training.max_steps, limit))
    if optimizer.schedule == "constant" and optimizer.min_learning_rate_ratio > 0.0:
        text = "has no effect with optimizer.schedule constant; leave it out, or take linear or cosine"
        yield mistake("optimizer.min_learning_rate_ratio", text)

    if optimizer.rounding != "stochastic" and "bfloat16" not in (model.dtype, optimizer.state_dtype):
        yield mistake("optimizer.rounding", "has no effect on weights and moments of float32; leave it out")

    axes = asdict(run.mesh)
    for axis, size in axes.items():
        if size == 0:
            yield mistake(f"mesh.{axis}", "is 0; expected a number of devices, or -1 for all that the other axes leave")
    if list(axes.values()).count(-1) > 1:
        rest = " and ".join(f"mesh.{axis}" for axis, size in axes.items() if size == -1)
        yield mistake("mesh", f"leaves it to {rest} to take the devices that are left; expected one -1 at most")
