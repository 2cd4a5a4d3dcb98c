"""The whole configuration of a run as frozen dataclasses; `config_file` reads them from YAML.

The docstring of each class says what its fields mean; a field's default is what a config that leaves it out gets.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from jaxpo.batch import Mode
from jaxpo.objectives import DPO, AnyObjective

STRICT = ConfigDict(extra="forbid", strict=True)

# What a model's path begins with where it is the result of an earlier stage.
STAGE = "stage:"

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
    """The model to train: `path` or `scratch`.

    path: a folder, a hub id, `stage:NAME`, the result of an earlier stage, or another run or a checkpoint in it
    (RUN/checkpoints/STEP), of which the weights are taken alone.

    dtype: of the master weights. compute_dtype: of the matrix products; logits, softmax and losses are float32 always.
    remat: what the backward pass recomputes: nothing; everything but the layers' inputs (`full`), but matrix products
    and the attention's output (`dots`), or but queries, keys, values and that output (`attention`); `offload` is as
    `attention`, with what is kept in the host's memory. unroll: layers that the compiler sees at once; more may run
    faster.
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
    ends first. eval_every, save_every: in steps; null for an evaluation before and after and a checkpoint at the end.
    keep_checkpoints: the last so many stay; keep_every: and for good one at each multiple of so many steps.
    best_metric: an `eval_` metric whose best checkpoint is kept too. best_mode: whether the smallest (min) or the
    largest (max) is the best; null goes by the metric's name.
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
    keep_every: PositiveInt | None = None
    best_metric: Named | None = None
    best_mode: Mode | None = None
    seed: Seed = 0
    max_grad_norm: PositiveFloat | None = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW with a warmup and a schedule down to `min_learning_rate_ratio` times the learning rate.

    Weight decay spares biases and norms. warmup_steps takes the place of warmup_ratio. state_dtype: of the moments,
    null for that of the weights. rounding: of bfloat16 weights and moments after an update in float32; `nearest` loses
    updates below a 256th of a weight, `stochastic` keeps them on average. offload: keep moments in the hosts' memory.
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
    """Devices along each axis: copies (`data`), sharded states (`fsdp`), rows that are too long for one device
    (`sequence`, which shards states too), sharded layers (`tensor`); -1 for the rest.
    """

    data: AxisSize = 1
    fsdp: AxisSize = -1
    sequence: AxisSize = 1
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
