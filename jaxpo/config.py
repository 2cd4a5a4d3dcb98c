"""The whole configuration of a run as frozen dataclasses; `config_file` reads them from YAML.

The docstring of each class says what its fields mean; a field's default is what a config that leaves it out gets.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from jaxpo.batch import Mode, direction
from jaxpo.objectives import DPO, AnyObjective

STRICT = ConfigDict(extra="forbid", strict=True)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFraction = Annotated[float, Field(gt=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
AxisSize = Annotated[int, Field(ge=-1)]
# jax keeps 32 bits of a seed: a larger one would be another's equal.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Dtype = Literal["float32", "bfloat16"]
Named = Annotated[str, Field(min_length=1)]
Format = Literal[
    "auto",
    "pairs",
    "transcripts",
    "helpsteer3",
    "conversations",
    "alpaca",
    "completions",
    "messages",
    "text",
    "labels",
    "rankings",
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScratchTokenizer:
    """A byte-level BPE tokenizer trained on the text of `data.train`; `vocab_size` counts the special tokens."""

    vocab_size: Annotated[int, Field(ge=260)] = 1024
    chat_template: Named = "chatml"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Scratch:
    """A new model: `architecture` is a Hugging Face config (`model_type: llama, hidden_size: 128, …`).

    The vocabulary size and the special token ids come from the tokenizer.
    """

    architecture: dict[str, Any]
    tokenizer: ScratchTokenizer = ScratchTokenizer()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The model to train: `path` is a folder, a hub id or `stage:NAME`, the result of an earlier stage; or `scratch`.

    dtype: of the master weights. compute_dtype: of the matrix products; logits, softmax and losses are float32 always.
    remat: what the backward pass recomputes: nothing; everything but the layers' inputs (`full`), but matrix products
    (`dots`), or but queries, keys, values and what attention makes of them (`attention`); `offload` is as `attention`,
    with what is kept in the host's memory. unroll: layers that the compiler sees at once; more may run faster.
    attention: how it is computed, see `models.attention`; `auto` takes what is fastest on the platform.
    """

    path: Named | None = None
    revision: Named | None = None
    scratch: Scratch | None = None
    dtype: Dtype = "float32"
    compute_dtype: Dtype = "bfloat16"
    remat: Literal["none", "full", "dots", "attention", "offload"] = "full"
    unroll: PositiveInt = 1
    attention: Literal["auto", "dense", "blocked", "splash", "cudnn"] = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSource:
    """A set of rows: a hub dataset id, a folder of `save_to_disk`, a .json, .jsonl[.gz], .parquet file or `jaxpo:NAME`.

    name: the dataset's configuration on the hub. format: how rows are read (`labels`: an answer and whether it is
    desirable; `rankings`: a list of answers, the best one first); `auto` looks at the columns. weight: share of this
    source among the examples of an epoch, relative to the other sources' (all or none of them have one; without, every
    example is seen once an epoch). limit: only the first rows.
    """

    path: Named
    split: Named = "train"
    name: Named | None = None
    revision: Named | None = None
    format: Format = "auto"
    weight: PositiveFloat | None = None
    limit: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What to train and evaluate on, and how rows become tokens.

    max_length: tokens of a prompt with one completion. max_prompt_length: a longer prompt loses tokens at
    `truncate_prompt`'s side; null cuts no prompt, and what max_length leaves of the completions is kept.
    chat_template: a file or a built-in name, in place of the tokenizer's own. workers: processes that tokenise; null
    takes one per core.
    """

    train: tuple[DataSource, ...] = ()
    eval: tuple[DataSource, ...] = ()
    max_length: PositiveInt = 1024
    max_prompt_length: PositiveInt | None = None
    truncate_prompt: Literal["left", "right"] = "left"
    chat_template: Named | None = None
    shuffle: bool = True
    cache_dir: Path = Path("~/.cache/jaxpo/data")
    workers: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReferenceConfig:
    """The reference model, a table of log-probs in `cache_dir`; `path` names another model than the one to train.

    sync_steps: the reference follows the policy: after every so many steps it becomes mixup_alpha * policy + (1 -
    mixup_alpha) * reference. TR-DPO, Gorbatovski et al. 2024 (arXiv 2404.09656), for any objective with a reference;
    null leaves it where it is. Each time, the log-probs of the examples that the coming steps see are computed anew:
    one more forward pass for every example trained on, a third of a step's work, a quarter with `remat: full`.
    With a mixup_alpha of 1 no second model is held; below 1 the averaged weights are in memory and in checkpoints.
    """

    cache_dir: Path = Path("~/.cache/jaxpo/reference")
    path: Named | None = None
    revision: Named | None = None
    sync_steps: PositiveInt | None = None
    mixup_alpha: PositiveFraction = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """The course of the training.

    batch_size: examples of an optimizer step, exactly, whatever the packing. row_length and rows_per_device: tokens in
    a packed row, and rows that one device computes at once; they change speed and memory, never the result. row_shapes:
    how many lengths rows may have, row_length the longest and shorter ones that suit the data: less padding for a
    program compiled for each. packing and share_prompt: off for comparisons only. num_epochs or max_steps, whichever
    ends first. eval_every, save_every: in steps; null means an evaluation before and after only, and a checkpoint after
    the last step only. best_metric: an `eval_` metric whose best checkpoint is kept too. best_mode: whether the
    smallest (min) or the largest (max) is the best; null goes by the metric's name.
    """

    batch_size: PositiveInt = 64
    row_length: PositiveInt = 2048
    rows_per_device: PositiveInt = 1
    row_shapes: PositiveInt = 1
    packing: bool = True
    share_prompt: bool = True
    num_epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    eval_every: PositiveInt | None = None
    save_every: PositiveInt | None = 500
    keep_checkpoints: PositiveInt = 3
    best_metric: Named | None = None
    best_mode: Mode | None = None
    seed: Seed = 0
    max_grad_norm: PositiveFloat | None = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW with a warmup and a schedule down to `min_learning_rate_ratio` times the learning rate.

    Weight decay spares biases and norms. warmup_steps takes the place of warmup_ratio. state_dtype: of the moments,
    null for that of the weights. rounding: of bfloat16 weights and moments after an update computed in float32;
    `nearest` loses updates below a 256th of a weight, `stochastic` keeps them on average. offload: moments lie in the
    hosts' memory and cross to the devices for each update, for models that do not fit otherwise.
    """

    name: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 5.0e-7
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Fraction = 0.0
    warmup_steps: NonNegativeInt | None = None
    min_learning_rate_ratio: Fraction = 0.0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0
    state_dtype: Dtype | None = None
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    offload: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """Devices along each axis: copies (`data`), sharded states (`fsdp`), sharded layers (`tensor`); -1 for the rest."""

    data: AxisSize = 1
    fsdp: AxisSize = -1
    tensor: AxisSize = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WandbConfig:
    """Weights & Biases: the project, and what else `wandb.init` takes under these names."""

    project: Named
    name: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoggingConfig:
    """A line in metrics.jsonl every `every` steps; TensorBoard and W&B besides."""

    every: PositiveInt = 10
    tensorboard: bool = False
    wandb: WandbConfig | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplesConfig:
    """Greedy answers to the first `prompts` held-out prompts, before and after training."""

    prompts: NonNegativeInt = 4
    max_new_tokens: PositiveInt = 64


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportConfig:
    """The Hugging Face folder: its dtype (null: model.dtype), and which checkpoint it holds, the last or the best."""

    dtype: Dtype | None = None
    checkpoint: Literal["last", "best"] = "last"
    max_shard_gb: PositiveFloat = 5.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaptiveBeta:
    """Beta moved so that the policy's smoothed distance to the reference stays in a band.

    Each step above `kl_high` multiplies beta by 1 + rate, each step below `kl_low` divides it by that; beta stays
    within a factor of `limit` of what the objective says. A policy starts at its reference, so that beta falls first,
    unless kl_low is 0. The factor is logged as `beta_scale`. After the adaptive penalty of Ziegler et al. 2019 (arXiv
    1909.08593), sec. 2.2.
    """

    kl_low: NonNegativeFloat
    kl_high: PositiveFloat
    rate: PositiveFraction = 0.02
    limit: Annotated[float, Field(gt=1.0)] = 10.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EarlyStop:
    """End the run once `metric`, an `eval_` metric, was not better than its best for `patience` evaluations in a row.

    Better is larger with mode max and smaller with min, by more than min_delta; null goes by the metric's name, as
    training.best_mode. The evaluation before the first step is the first to be compared with.
    """

    metric: Named
    mode: Mode | None = None
    patience: PositiveInt = 3
    min_delta: NonNegativeFloat = 0.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ControlConfig:
    """The run's control of itself.

    Its distance to the reference is the mean of |log pi - log pi_ref| over the completions of a batch, in nats
    (`kl/abs`), as an average over about the last ten batches that starts at 0, logged as `kl/smoothed`. max_kl: the run
    ends at the first logged step whose smoothed distance, to the reference as it is then, is larger. A run that ends
    early is evaluated, saved and exported as at its last step; summary.json tells why it `stopped`.
    """

    adaptive_beta: AdaptiveBeta | None = None
    max_kl: PositiveFloat | None = None
    early_stop: EarlyStop | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Run:
    """One training run. `stages` are runs to do first, in order; a later one starts from `model: {path: stage:NAME}`.

    A stage says everything it needs itself: it inherits nothing but its place, `output_dir/stages/NAME`.
    """

    output_dir: Path | None = None
    model: ModelConfig
    data: DataConfig
    objective: AnyObjective = DPO()
    reference: ReferenceConfig = ReferenceConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    control: ControlConfig = ControlConfig()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()
    samples: SamplesConfig = SamplesConfig()
    export: ExportConfig = ExportConfig()
    stages: dict[str, "Run"] = Field(default_factory=dict)


class Mistake(NamedTuple):
    """What is wrong with a configuration whose types are right: the key, as a path, and the message, which names it."""

    path: tuple[str | int, ...]
    text: str


STAGE = "stage:"


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

    axes = {"data": run.mesh.data, "fsdp": run.mesh.fsdp, "tensor": run.mesh.tensor}
    for axis, size in axes.items():
        if size == 0:
            yield mistake(f"mesh.{axis}", "is 0; expected a number of devices, or -1 for all that the other axes leave")
    if list(axes.values()).count(-1) > 1:
        rest = " and ".join(f"mesh.{axis}" for axis, size in axes.items() if size == -1)
        yield mistake("mesh", f"leaves it to {rest} to take the devices that are left; expected one -1 at most")
