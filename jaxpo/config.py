"""The whole configuration of a run as frozen dataclasses; `config_file` reads them from YAML.

The docstring of each class says what its fields mean; a field's default is what a config that leaves it out gets.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from jaxpo.objectives import DPO, AnyObjective

STRICT = ConfigDict(extra="forbid", strict=True)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
AxisSize = Annotated[int, Field(ge=-1)]
Dtype = Literal["float32", "bfloat16"]
Format = Literal["auto", "pairs", "transcripts", "helpsteer3", "conversations", "completions", "messages", "text"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScratchTokenizer:
    """A byte-level BPE tokenizer trained on the text of `data.train`; `vocab_size` counts the special tokens."""

    vocab_size: Annotated[int, Field(ge=260)] = 1024
    chat_template: str = "chatml"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Scratch:
    """A new model: `architecture` is a Hugging Face config (`model_type: llama, hidden_size: 128, …`).

    The vocabulary size and the special token ids come from the tokenizer.
    """

    architecture: dict[str, Any]
    tokenizer: ScratchTokenizer = ScratchTokenizer()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The model to train: a folder or hub id in `path`, the result of an earlier stage as `path: stage:NAME`, or `scratch`.

    dtype: of the master weights and the optimizer state. compute_dtype: of the matrix multiplications; logits, softmax
    and losses are float32 always. remat: what the backward pass recomputes: nothing, everything but the layers' inputs
    (`full`), or everything but matrix products (`dots`); attention probabilities are recomputed always.
    """

    path: str | None = None
    revision: str | None = None
    scratch: Scratch | None = None
    dtype: Dtype = "float32"
    compute_dtype: Dtype = "bfloat16"
    remat: Literal["none", "full", "dots"] = "full"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSource:
    """A set of rows: a hub dataset id, a folder of `save_to_disk`, a .json, .jsonl[.gz] or .parquet file, or `jaxpo:NAME`.

    name: the dataset's configuration on the hub. format: how rows are read; `auto` looks at the columns. weight: share of
    this source among the examples of an epoch, relative to the other sources' (all or none of them have one; without,
    every example is seen once an epoch). limit: only the first rows.
    """

    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    format: Format = "auto"
    weight: PositiveFloat | None = None
    limit: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What to train and evaluate on, and how rows become tokens.

    max_length: tokens of a prompt with one completion. max_prompt_length: a longer prompt loses tokens at
    `truncate_prompt`'s side; null leaves it to max_length. chat_template: a file or a built-in name, in place of the
    tokenizer's own. workers: processes that tokenise; null takes one per core.
    """

    train: tuple[DataSource, ...] = ()
    eval: tuple[DataSource, ...] = ()
    max_length: PositiveInt = 1024
    max_prompt_length: PositiveInt | None = None
    truncate_prompt: Literal["left", "right"] = "left"
    chat_template: str | None = None
    shuffle: bool = True
    cache_dir: Path = Path("~/.cache/jaxpo/data")
    workers: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReferenceConfig:
    """The reference model, a table of log-probs in `cache_dir`; `path` names another model than the one to train."""

    cache_dir: Path = Path("~/.cache/jaxpo/reference")
    path: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """The course of the training.

    batch_size: examples of an optimizer step, exactly, whatever the packing. row_length and rows_per_device: tokens in a
    packed row, and rows that one device computes at once; they change speed and memory, never the result. packing and
    share_prompt: off for comparisons only. num_epochs or max_steps, whichever ends first. eval_every, save_every: in
    steps; null means only before and after. best_metric: an `eval_` metric whose best checkpoint is kept too.
    """

    batch_size: PositiveInt = 64
    row_length: PositiveInt = 2048
    rows_per_device: PositiveInt = 1
    packing: bool = True
    share_prompt: bool = True
    num_epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    eval_every: PositiveInt | None = None
    save_every: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 3
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "max"
    seed: NonNegativeInt = 0
    max_grad_norm: PositiveFloat | None = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW with a warmup and a schedule down to `min_learning_rate_ratio` times the learning rate.

    Weight decay spares biases and norms. warmup_steps, where given, takes the place of warmup_ratio.
    """

    name: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 5.0e-7
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Fraction = 0.1
    warmup_steps: NonNegativeInt | None = None
    min_learning_rate_ratio: Fraction = 0.0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: PositiveFloat = 1.0e-8
    weight_decay: NonNegativeFloat = 0.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """Devices along each axis: copies (`data`), sharded states (`fsdp`), sharded layers (`tensor`); -1 takes the rest."""

    data: AxisSize = 1
    fsdp: AxisSize = -1
    tensor: AxisSize = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WandbConfig:
    """Weights & Biases: the project, and what else `wandb.init` takes under these names."""

    project: str
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
    """The Hugging Face folder: its dtype (null: model.dtype), and whether the last or the best checkpoint goes into it."""

    dtype: Dtype | None = None
    checkpoint: Literal["last", "best"] = "last"
    max_shard_gb: PositiveFloat = 5.0


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
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()
    samples: SamplesConfig = SamplesConfig()
    export: ExportConfig = ExportConfig()
    stages: dict[str, "Run"] = Field(default_factory=dict)
