"""Every option is read: changing it changes something that can be seen, or is refused.

Hyper-parameters of objectives are found and changed by themselves, on the arrays that an objective sees. Each other
field of the configuration has an entry in OPTIONS: a change of it, and the part of a run in which it shows. A field
without an entry fails. The runs are whole ones but for what takes time: forward and backward passes, the optimizer's
updates, sampling, plots and the writing of exports, of which the arguments are looked at.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import datasets
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from objective_cases import CASES, DIVERGENCES, MEMBERS, MODIFIERS, completions, value_and_gradient
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from jaxpo import config_file, delivery, references, run
from jaxpo.batch import Metric, Objective
from jaxpo.config import Run
from jaxpo.data import dataset
from jaxpo.errors import UserError
from jaxpo.evaluation import plots
from jaxpo.models.decoder import abstract_decoder
from jaxpo.objectives.divergences import ReverseKL
from jaxpo.objectives.mixture import Term
from jaxpo.objectives.modifiers import NLL
from jaxpo.objectives.reference_free import SimPO
from jaxpo.objectives.score import microbatch
from jaxpo.training.optimizer import make_optimizer
from jaxpo.training.step import StepResult, TrainState

# What there is to look at of a run: see `observe`.
Part = Literal[
    "batches",
    "checkpoints",
    "data",
    "datasets",
    "downloads",
    "error",
    "export",
    "files",
    "lines",
    "memory",
    "mesh",
    "model",
    "optimizer",
    "order",
    "program",
    "samples",
    "scored",
    "summary",
    "wandb",
    "workers",
]


class Option(NamedTuple):
    """Overrides that change an option, in a config with the overrides `given`, and the part of a run that shows it."""

    part: Part
    changes: tuple[str, ...]
    given: tuple[str, ...] = ()


def option(part: Part, *changes: str, given: tuple[str, ...] = ()) -> Option:
    return Option(part, changes, given)


LLAMA = "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}"
SCRATCH = ("model={scratch: {architecture: " + LLAMA + "}, compute_dtype: float32, remat: none}",)
WORLD = "[{path: jaxpo:customer-service, split: test, limit: 16}]"
TWO = ("data.train=[{path: TINY/dpo.jsonl, weight: 1}, {path: TINY/dpo-eval.jsonl, weight: 1}]",)
EVERY_STEP = ("training.eval_every=1", "training.save_every=1")
BEST = (*EVERY_STEP, "training.keep_checkpoints=1", "training.best_metric=eval_kl/abs")
BETA = ("control.adaptive_beta={kl_low: 0.3, kl_high: 0.9}",)
STOP = ("control.early_stop={metric: eval_confidence, mode: min, patience: 2}", "training.eval_every=1")
WANDB = ("logging.wandb={project: p}",)

OPTIONS: dict[str, Option] = {
    "output_dir": option("files", "output_dir=elsewhere"),
    "model.path": option("downloads", "model.path=org/model"),
    "model.revision": option("downloads", "model.revision=v2", given=("model.path=org/model",)),
    "model.scratch": option("model", *SCRATCH),
    "model.scratch.architecture": option("model", "model.scratch.architecture.hidden_size=64", given=SCRATCH),
    "model.scratch.tokenizer.vocab_size": option("data", "model.scratch.tokenizer.vocab_size=300", given=SCRATCH),
    "model.scratch.tokenizer.chat_template": option(
        "data", "model.scratch.tokenizer.chat_template=zephyr", given=SCRATCH
    ),
    "model.dtype": option("model", "model.dtype=bfloat16"),
    "model.compute_dtype": option("program", "model.compute_dtype=bfloat16"),
    "model.remat": option("program", "model.remat=full"),
    "model.unroll": option("program", "model.unroll=2"),
    "model.attention": option("program", "model.attention=dense"),
    "data.train": option("data", "data.train=[{path: TINY/dpo.jsonl}, {path: TINY/dpo-eval.jsonl}]"),
    "data.train.path": option("data", "data.train.0.path=TINY/dpo-eval.jsonl"),
    "data.train.split": option("data", "data.train.0.split=train", given=(f"data.train={WORLD}",)),
    "data.train.name": option("datasets", "data.train.0.name=en", given=("data.train=[{path: org/pairs}]",)),
    "data.train.revision": option("datasets", "data.train.0.revision=v2", given=("data.train=[{path: org/pairs}]",)),
    "data.train.format": option("error", "data.train.0.format=alpaca"),
    "data.train.weight": option("order", "data.train.0.weight=3", given=TWO),
    "data.train.limit": option("data", "data.train.0.limit=40"),
    "data.eval": option("lines", "data.eval=[]", "training.eval_every=null"),
    "data.eval.path": option("data", "data.eval.0.path=TINY/dpo.jsonl"),
    "data.eval.split": option("data", "data.eval.0.split=train", given=(f"data.eval={WORLD}",)),
    "data.eval.name": option("datasets", "data.eval.0.name=en", given=("data.eval=[{path: org/pairs}]",)),
    "data.eval.revision": option("datasets", "data.eval.0.revision=v2", given=("data.eval=[{path: org/pairs}]",)),
    "data.eval.format": option("error", "data.eval.0.format=alpaca"),
    "data.eval.weight": option("error", "data.eval.0.weight=3"),
    "data.eval.limit": option("data", "data.eval.0.limit=5"),
    "data.max_length": option("data", "data.max_length=60"),
    "data.max_prompt_length": option("data", "data.max_prompt_length=12"),
    "data.truncate_prompt": option("data", "data.truncate_prompt=right", given=("data.max_prompt_length=12",)),
    "data.chat_template": option("data", "data.chat_template=zephyr"),
    "data.shuffle": option("order", "data.shuffle=false"),
    "data.cache_dir": option("files", "data.cache_dir=elsewhere"),
    "data.workers": option("workers", "data.workers=3"),
    "reference.cache_dir": option("files", "reference.cache_dir=elsewhere"),
    "reference.path": option("scored", "reference.path=OTHER"),
    "reference.revision": option("downloads", "reference.revision=v2", given=("reference.path=org/model",)),
    "reference.sync_steps": option("scored", "reference.sync_steps=2"),
    "reference.mixup_alpha": option("scored", "reference.mixup_alpha=0.5", given=("reference.sync_steps=2",)),
    "training.batch_size": option("order", "training.batch_size=4"),
    "training.row_length": option("batches", "training.row_length=512"),
    "training.row_shapes": option("batches", "training.row_shapes=4"),
    "training.rows_per_device": option("batches", "training.rows_per_device=2"),
    "training.packing": option("batches", "training.packing=false"),
    "training.share_prompt": option("batches", "training.share_prompt=false"),
    "training.num_epochs": option(
        "lines", "training.num_epochs=2", given=("training.max_steps=null", "training.batch_size=40")
    ),
    "training.max_steps": option("lines", "training.max_steps=3"),
    "training.eval_every": option("lines", "training.eval_every=2"),
    "training.save_every": option("checkpoints", "training.save_every=3"),
    "training.keep_checkpoints": option("checkpoints", "training.keep_checkpoints=1", given=EVERY_STEP),
    "training.keep_every": option("checkpoints", "training.keep_every=2"),
    "training.best_metric": option("checkpoints", "training.best_metric=null", given=BEST),
    "training.best_mode": option(
        "checkpoints",
        "training.best_mode=min",
        given=(*BEST, "training.best_metric=eval_confidence", "training.best_mode=max"),
    ),
    "training.seed": option("order", "training.seed=5"),
    "training.max_grad_norm": option("optimizer", "training.max_grad_norm=0.01"),
    "optimizer.name": option("error", "optimizer.name=sgd"),
    "optimizer.learning_rate": option("optimizer", "optimizer.learning_rate=3.0e-3"),
    "optimizer.schedule": option("optimizer", "optimizer.schedule=linear"),
    "optimizer.warmup_ratio": option("optimizer", "optimizer.warmup_ratio=0.5"),
    "optimizer.warmup_steps": option("optimizer", "optimizer.warmup_steps=4"),
    "optimizer.min_learning_rate_ratio": option("optimizer", "optimizer.min_learning_rate_ratio=0.5"),
    "optimizer.betas": option("optimizer", "optimizer.betas=[0.5, 0.9]"),
    "optimizer.eps": option("optimizer", "optimizer.eps=0.1"),
    "optimizer.state_dtype": option("optimizer", "optimizer.state_dtype=bfloat16"),
    "optimizer.rounding": option("optimizer", "optimizer.rounding=nearest", given=("model.dtype=bfloat16",)),
    "optimizer.offload": option("memory", "optimizer.offload=true"),
    "optimizer.weight_decay": option("optimizer", "optimizer.weight_decay=0.5"),
    "control.adaptive_beta": option("lines", *BETA),
    "control.adaptive_beta.kl_low": option("lines", "control.adaptive_beta.kl_low=0", given=BETA),
    "control.adaptive_beta.kl_high": option("lines", "control.adaptive_beta.kl_high=9.0", given=BETA),
    "control.adaptive_beta.rate": option("lines", "control.adaptive_beta.rate=0.5", given=BETA),
    "control.adaptive_beta.limit": option("lines", "control.adaptive_beta.limit=1.01", given=BETA),
    "control.max_kl": option("summary", "control.max_kl=0.5"),
    "control.early_stop": option("summary", "control.early_stop={metric: eval_kl/abs}", "training.eval_every=1"),
    "control.early_stop.metric": option("summary", "control.early_stop.metric=eval_loss", given=STOP),
    "control.early_stop.mode": option("summary", "control.early_stop.mode=max", given=STOP),
    "control.early_stop.patience": option("summary", "control.early_stop.patience=3", given=STOP),
    "control.early_stop.min_delta": option(
        "summary", "control.early_stop.min_delta=9.0", given=(*STOP, "control.early_stop.mode=max")
    ),
    "mesh.data": option("mesh", "mesh.data=2"),
    "mesh.fsdp": option("mesh", "mesh.fsdp=4", given=("mesh.data=-1", "mesh.fsdp=2")),
    "mesh.sequence": option("mesh", "mesh.sequence=2"),
    "mesh.tensor": option("mesh", "mesh.tensor=2"),
    "logging.every": option("lines", "logging.every=2"),
    "logging.tensorboard": option("files", "logging.tensorboard=true"),
    "logging.wandb": option("wandb", *WANDB),
    "logging.wandb.project": option("wandb", "logging.wandb.project=q", given=WANDB),
    "logging.wandb.name": option("wandb", "logging.wandb.name=n", given=WANDB),
    "logging.wandb.entity": option("wandb", "logging.wandb.entity=us", given=WANDB),
    "logging.wandb.mode": option("wandb", "logging.wandb.mode=offline", given=WANDB),
    "samples.prompts": option("samples", "samples.prompts=1"),
    "samples.max_new_tokens": option("samples", "samples.max_new_tokens=5"),
    "export.dtype": option("export", "export.dtype=bfloat16"),
    "export.checkpoint": option("summary", "export.checkpoint=best", given=BEST),
    "export.max_shard_gb": option("export", "export.max_shard_gb=1.0"),
    "stages": option("files", "stages={first: STAGE}"),
}
STAGE = (
    "{model: {path: TINY/llama}, data: {train: [{path: TINY/dpo.jsonl}], cache_dir: data}, "
    "reference: {cache_dir: reference}, training: {max_steps: 1, batch_size: 8}, samples: {prompts: 0}}"
)
# Of these the fields are looked at one by one, by themselves.
OBJECTIVE = "objective"


def fields_of(cls: type, prefix: str = "") -> Iterator[str]:
    """The paths of all options below a dataclass: lists and optional sections are options, and so are their fields."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path, kind = f"{prefix}{field.name}", hints[field.name]
        if path == OBJECTIVE:
            continue
        inner = next((part for part in (kind, *get_args(kind)) if dataclasses.is_dataclass(part)), None)
        if not isinstance(inner, type) or get_origin(kind) is dict:
            yield path
            continue
        if inner is not kind:
            yield path
        yield from fields_of(inner, f"{path}.")


def test_every_field_of_the_configuration_has_an_entry() -> None:
    """Whoever adds one says here what shows that it is read."""
    assert set(fields_of(Run)) == set(OPTIONS)


def test_the_walk_finds_every_kind_of_field() -> None:
    found = set(fields_of(Run))
    assert {"stages", "data.train", "data.train.path", "model.scratch.tokenizer.vocab_size", "logging.wandb"} <= found
    assert "logging.wandb.entity" in found
    assert not [path for path in found if path.startswith("stages.") or path in ("model", "data", "training")]


# A run, but for what takes time.


def digest(tree: Any) -> str:
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf)
        content.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return content.hexdigest()


class Watched:
    """Takes the places of what takes time in a run, and remembers what it was asked."""

    def __init__(self, tiny: Path):
        self.tiny = tiny
        self.parts: Any = None
        self.calls: dict[str, list[Any]] = {
            name: [] for name in ("downloads", "datasets", "workers", "scored", "samples", "export", "steps", "wandb")
        }
        self.optimizer: tuple[Any, ...] = ()
        self.placed: Any = None

    def install(self, patch: pytest.MonkeyPatch) -> None:
        # Few rows are enough to be shared out among workers.
        patch.setattr(dataset, "POOL_ROWS", 8)
        patch.setattr(dataset, "tokenise", self._tokenising(dataset.tokenise))
        patch.setattr(datasets, "load_dataset", self._load_dataset)
        patch.setattr(huggingface_hub, "snapshot_download", self._download)
        patch.setattr(run, "prepare", self._preparing(run.prepare))
        patch.setattr(run.loader, "steps", self._stepping(run.loader.steps))
        patch.setattr(run, "make_optimizer", self._make_optimizer)
        patch.setattr(run, "abstract_state", self._placing(run.abstract_state))
        patch.setattr(run, "make_train_step", self._make_train_step)
        patch.setattr(run, "make_evaluation_step", self._make_evaluation_step)
        patch.setattr(references, "completion_logps", self._completion_logps)
        patch.setattr(run, "greedy", self._greedy)
        patch.setattr(plots, "write", lambda *_: None)
        patch.setattr(delivery, "export", self._export)
        patch.setitem(sys.modules, "wandb", self._wandb())

    def _tokenising(self, real: Any) -> Any:
        def tokenise(rows: Any, tokeniser: Any, workers: int) -> Any:
            self.calls["workers"].append(workers)
            return real(rows, tokeniser, 1)

        return tokenise

    def _load_dataset(self, *args: Any, **kwargs: Any) -> Any:
        self.calls["datasets"].append((args, sorted(kwargs.items())))
        rows = (self.tiny / "dpo.jsonl").read_text(encoding="utf-8").splitlines()
        return datasets.Dataset.from_list([json.loads(row) for row in rows])

    def _download(self, hub_id: str, revision: str | None = None, **_: Any) -> str:
        self.calls["downloads"].append((hub_id, revision))
        return str(self.tiny / "llama")

    def _preparing(self, real: Any) -> Any:
        def prepared(*args: Any) -> Any:
            self.parts = real(*args)
            return self.parts

        return prepared

    def _placing(self, real: Any) -> Any:
        def placed(config: Any, model: Any, layout: Any, _: Any, control: Any) -> Any:
            # The run's own optimizer is replaced by none, which has no state.
            self.placed = real(config, model, layout, make_optimizer(*self.optimizer), control).optimizer
            return real(config, model, layout, optax.identity(), control)

        return placed

    def _stepping(self, real: Any) -> Any:
        def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for step in real(*args, **kwargs):
                self.calls["steps"].append((step.examples, digest(step.batch)))
                yield step

        return steps

    def _make_optimizer(self, *args: Any) -> optax.GradientTransformation:
        self.optimizer = args
        return optax.identity()

    def _make_train_step(self, objective: Objective, scorer: Any, optimizer: Any, control: Any) -> Any:
        def step(state: TrainState, batch: Any) -> tuple[TrainState, StepResult]:
            n = (state.step + 1).astype(jnp.float32)
            metrics = {"loss": Metric(1.0 / n, jnp.float32(1.0)), "kl/abs": Metric(2.0 * n, jnp.float32(1.0))}
            decoder: Any = jax.tree.map(lambda w: w + jnp.asarray(0.125, w.dtype), state.decoder)
            carry = {**state.carry, **control.next_carry(state.carry, metrics)}
            one = jnp.float32(1.0)
            result = StepResult(metrics=metrics, grad_norm=one, update_norm=one, finite=jnp.isfinite(one), carry=carry)
            return TrainState(state.step + 1, decoder, state.optimizer, carry), result

        return step

    def _make_evaluation_step(self, objective: Objective, scorer: Any) -> Any:
        def step(decoder: Any, batch: Any, carry: Any) -> Any:
            """Further from the reference, a lower loss, and surer, from step to step."""
            one, kl = jnp.float32(1.0), carry["kl"]
            found = {"loss": 1.0 / (1.0 + kl), "kl/abs": kl, "confidence": kl}
            return {name: Metric(value, one) for name, value in found.items()}

        return step

    def _completion_logps(self, decoder: Any, examples: Any, *_: Any) -> Any:
        def compute(chunk: Any) -> np.ndarray:
            self.calls["scored"].append((len(chunk), digest(decoder)))
            return np.full((len(chunk), 1, len(examples[0].completions)), -1.0, np.float32)

        return compute

    def _greedy(self, decoder: Any, prompts: list[Any], *settings: Any) -> list[np.ndarray]:
        self.calls["samples"].append((len(prompts), settings))
        return [np.zeros(1, np.int32) for _ in prompts]

    def _export(self, decoder: Any, hf_config: Any, folder: Path, **settings: Any) -> None:
        self.calls["export"].append({key: str(value) for key, value in sorted(settings.items())})

    def _wandb(self) -> ModuleType:
        found: Any = ModuleType("wandb")
        found.__spec__ = ModuleSpec("wandb", None)

        class Logged:
            def log(self, *_: Any, **__: Any) -> None: ...
            def finish(self) -> None: ...

        def init(config: Any, **settings: Any) -> Logged:
            self.calls["wandb"].append({key: str(value) for key, value in settings.items() if key != "dir"})
            return Logged()

        found.init = init
        util: Any = ModuleType("util")
        util.generate_id = lambda: "id"
        found.util = util
        return found

    def decoder_of(self) -> Any:
        return abstract_decoder(self.parts.checkpoint.decoder_config, self.parts.run.model.dtype)

    def program(self) -> str:
        """The scorer's operations on a batch, as traced."""
        parts = self.parts
        batch, _ = run.loader.pack([parts.train[0]], None, parts.packing)
        return str(jax.make_jaxpr(lambda d, b: parts.scorer(d, microbatch(b, jnp.int32(0))))(self.decoder_of(), batch))

    def updates(self) -> str:
        """Of a few steps of the real optimizer, on gradients of different sizes."""
        optimizer = make_optimizer(*self.optimizer)
        weights: Any = jax.tree.map(lambda a: jnp.full(a.shape, 0.5, a.dtype), self.decoder_of())
        state, found = optimizer.init(weights), []
        for n in range(5):
            gradients = jax.tree.map(lambda w, n=n: w * (n % 3 - 0.9), weights)
            updates, state = optimizer.update(gradients, state, weights)
            found.append(updates)
        return digest(found)


TIMES = {"pairs_per_s", "tokens_per_s", "tflops_per_s"}
KEPT = ("before", "after", "steps", "stopped", "exported_step", "examples", "dropped", "truncated")


class Bench:
    """Observes runs of the tiny config with overrides, each in a folder of its own."""

    def __init__(self, tiny: Path, folder: Path):
        self.tiny, self.folder, self.count = tiny, folder, 0
        self.other = folder / "other"
        shutil.copytree(tiny / "llama", self.other)
        weights = load_file(self.other / "model.safetensors")
        save_file({name: 2 * w for name, w in weights.items()}, self.other / "model.safetensors", {"format": "pt"})

    @cache  # noqa: B019  (it lives as long as the tests of this file)
    def observe(self, overrides: tuple[str, ...]) -> tuple[Watched, dict[str, Any]]:
        """What a run shows of itself."""
        self.count += 1
        place = self.folder / f"run{self.count}"
        place.mkdir()
        usual = ("output_dir=run", "data.cache_dir=data", "reference.cache_dir=reference", "samples.prompts=2")
        said = [text.replace("STAGE", STAGE) for text in (*usual, "training.save_every=null", *overrides)]
        said = [text.replace("TINY", str(self.tiny)).replace("OTHER", str(self.other)) for text in said]
        watched = Watched(self.tiny)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            watched.install(patch)
            try:
                folder = place / run.train(config_file.load(self.tiny / "dpo.yaml", said))
            except UserError as error:
                return watched, {"error": str(error)}
            return watched, {"error": None, **self._look(watched, folder, place)}

    def _look(self, watched: Watched, folder: Path, place: Path) -> dict[str, Any]:
        parts, calls = watched.parts, watched.calls
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
        decoder = jax.tree.map(lambda a: (a.shape, str(a.dtype)), watched.decoder_of())
        return {
            "batches": [batch for _, batch in calls["steps"]],
            "checkpoints": sorted(entry.name for entry in (folder / "checkpoints").iterdir()),
            "data": [[(s.format, len(s), s.fingerprint) for s in corpus.sources] for corpus in parts.corpora],
            "datasets": calls["datasets"],
            "downloads": calls["downloads"],
            "export": calls["export"],
            "files": sorted(
                str(entry.relative_to(place)) for top in (place, folder) for entry in top.iterdir() if entry.is_dir()
            ),
            "lines": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
            "memory": {leaf.sharding.memory_kind for leaf in jax.tree.leaves(watched.placed) if leaf.ndim},
            "mesh": dict(parts.layout.mesh.shape),
            "model": (str(decoder), parts.checkpoint.hf_config),
            "order": [examples for examples, _ in calls["steps"]],
            "samples": calls["samples"],
            "scored": calls["scored"],
            "summary": {key: summary[key] for key in KEPT},
            "wandb": calls["wandb"],
            "workers": calls["workers"],
        }

    def part(self, overrides: tuple[str, ...], part: Part) -> Any:
        watched, seen = self.observe(overrides)
        if part == "error":
            return seen["error"]
        assert seen["error"] is None, seen["error"]
        if part == "program":
            return watched.program()
        return watched.updates() if part == "optimizer" else seen[part]


@pytest.fixture(scope="module")
def bench(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tiny, tmp_path_factory.mktemp("options"))


def check(bench: Bench, path: str, one: Option) -> None:
    before = bench.part(one.given, one.part)
    after = bench.part((*one.given, *one.changes), one.part)
    assert before != after, f"{path}: nothing of a run's {one.part} changes with {', '.join(one.changes)}"
    if one.part == "error":
        assert before is None
        assert path.rpartition(".")[2] in after


@pytest.mark.parametrize("path", OPTIONS)
def test_every_option_is_read(path: str, bench: Bench) -> None:
    check(bench, path, OPTIONS[path])


def test_what_an_option_does_not_change_would_be_seen(bench: Bench) -> None:
    """Two observations of one config are the same, and what only steers speed does not change what is learnt."""
    once, again = (Bench.observe.__wrapped__(bench, ()) for _ in range(2))
    assert once[1] == again[1]
    assert (once[0].program(), once[0].updates()) == (again[0].program(), again[0].updates())
    for one in (
        option("order", "training.row_length=512"),
        option("batches", "optimizer.learning_rate=3.0e-3"),
        option("optimizer", "data.shuffle=false"),
        option("program", "training.seed=5"),
        option("lines", "optimizer.eps=0.1"),
        option("summary", "logging.every=2"),
    ):
        with pytest.raises(AssertionError, match=f"nothing of a run's {one.part} changes"):
            check(bench, "an option", one)


# Objectives


def inside(value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """An objective and what it is made of, with their places."""
    yield (), value
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        items = enumerate(held) if isinstance(held, tuple) else [(None, held)]
        for i, item in items:
            if dataclasses.is_dataclass(item):
                at = (field.name,) if i is None else (field.name, i)
                yield from (((*at, *below), one) for below, one in inside(item))


def put(value: Any, place: tuple[str | int, ...], new: Any) -> Any:
    """The objective with something else at a place."""
    if not place:
        return new
    name = place[0]
    assert isinstance(name, str)
    held = getattr(value, name)
    if isinstance(held, tuple) and len(place) > 1 and isinstance(i := place[1], int):
        return dataclasses.replace(value, **{name: (*held[:i], put(held[i], place[2:], new), *held[i + 1 :])})
    return dataclasses.replace(value, **{name: put(held, place[1:], new)})


def alternatives(owner: Any, name: str) -> Iterator[Any]:
    """Other values that a field may have, likely ones at least."""
    value = getattr(owner, name)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield from (1.5 * value, value + 0.1, 0.5 * value)
    elif isinstance(value, str):
        yield from (other for other in get_args(get_type_hints(type(owner))[name]) if other != value)
    elif name == "modifiers":
        yield from ((*value, NLL(coefficient=0.3)), (*value, MODIFIERS["wpo"]))
    elif name == "terms":
        yield value[:-1]
        yield (*value, Term(objective=SimPO()))
    elif name == "divergence":
        yield from DIVERGENCES.values()
    elif name in ("pair", "objective"):
        yield SimPO(beta=1.0)


def shows(objective: Any) -> Any:
    """What an objective asks for, and what it makes of completions."""
    asked = (
        objective.feedback,
        objective.num_completions,
        objective.uses_reference,
        objective.uses_labels,
        objective.uses_scores,
        objective.couples_examples,
        objective.statistics,
        objective.initial_carry(),
    )
    loss, metrics, gradient = value_and_gradient(objective, completions(objective))
    means = {name: (float(metric.sum), float(metric.weight)) for name, metric in metrics.items()}
    return asked, float(loss), means, digest(gradient)


# Every class that an objective can be made of, and its fields.
PIECES = [*MEMBERS, *map(type, MODIFIERS.values()), *map(type, DIVERGENCES.values()), Term]
HYPERPARAMETERS = sorted(
    {(cls.__name__, field.name) for cls in PIECES for field in dataclasses.fields(cls) if field.name != "name"}
)


@cache
def places_of(cls: str) -> list[tuple[Objective, tuple[str | int, ...], Any]]:
    """Where the cases have a piece of a class."""
    return [
        (objective, place, one)
        for objective in CASES.values()
        for place, one in inside(objective)
        if type(one).__name__ == cls
    ]


@pytest.mark.parametrize(("cls", "name"), HYPERPARAMETERS, ids=[".".join(pair) for pair in HYPERPARAMETERS])
def test_every_hyperparameter_is_read(cls: str, name: str) -> None:
    """In one case at least, to which the objectives' own tests add what each of them does."""
    tried = 0
    for objective, place, one in places_of(cls):
        for value in alternatives(one, name):
            try:
                changed = put(objective, place, dataclasses.replace(one, **{name: value}))
            except ValidationError:
                continue
            tried += 1
            if shows(changed) != shows(objective):
                return
    pytest.fail(f"{cls}.{name}: nothing changes with it, in {tried} trials")


def test_names_tell_objectives_and_their_pieces_apart() -> None:
    names = [cls.name for cls in {*PIECES, ReverseKL} - {Term}]
    assert len(names) == len(set(names))
