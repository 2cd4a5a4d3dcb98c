"""What changes the speed never changes the training: packing, sharing, row length, accumulation, devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tokenizers import Tokenizer

from jaxpo.batch import Example
from jaxpo.config import MeshConfig, OptimizerConfig
from jaxpo.data.pack import Packing, pack
from jaxpo.models.checkpoint import read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.decoder import Decoder, Remat
from jaxpo.objectives import DPO
from jaxpo.objectives.score import Scorer, head_blocks
from jaxpo.reference.compute import completion_logps
from jaxpo.training.control import Control
from jaxpo.training.mesh import AXES, BATCH_AXES, Layout, make_mesh
from jaxpo.training.optimizer import make_optimizer
from jaxpo.training.step import TrainState, initial_carry, make_train_step

STEPS = 3
# AdamW's first updates are nearly the signs of the gradients: where a gradient is rounding noise, its sign is chance,
# and a weight moves by the whole learning rate up or down. So weights are compared in norm, tensor by tensor, at a
# learning rate as people use it; an update that is wrong by a few hundredths would show. The gradients themselves are
# compared through AdamW's first moment, a linear function of them.
TOLERANCE = 1e-5
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule="constant", weight_decay=0.1)


@dataclass(frozen=True)
class Way:
    """A way to compute the same training. Without a mesh on one device; rows: of one device at once."""

    row_length: int = 256
    rows: int = 1
    packed: bool = True
    share_prompt: bool = True
    mesh: MeshConfig | None = None
    remat: Remat = "none"


class Outcome(NamedTuple):
    """Losses and gradient norms of each step, the last weights and first moments, the reference's log-probs."""

    losses: list[float]
    grad_norms: list[float]
    weights: Any
    moments: Any
    table: np.ndarray
    microbatches: int


def train(decoder: Decoder, examples: list[Example], way: Way, offset: np.ndarray, table: np.ndarray | None) -> Outcome:
    """Three steps on one batch. The reference is computed the same way, unless given, and shifted by `offset`."""
    alone = jax.make_mesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:1])
    layout = Layout(alone if way.mesh is None else make_mesh(way.mesh))
    scorer = Scorer(
        compute_dtype="float32",
        remat=way.remat,
        blocks=head_blocks(way.row_length // layout.row_devices, way.rows, "cpu", layout.mesh.size),
        devices=layout,
    )
    devices = layout.batch_devices
    packing = Packing(way.row_length, way.rows * devices, way.packed, way.share_prompt, devices=devices)
    weights = jax.device_put(decoder, layout.decoder(decoder.config, decoder))
    if table is None:
        table = completion_logps(weights, examples, scorer, packing, layout.put)(range(len(examples)))
    optimizer = make_optimizer(OPTIMIZER, decoder.config, STEPS, 1.0)
    step = jax.jit(make_train_step(DPO(), scorer, optimizer, Control()), donate_argnums=0)
    batch = pack(examples, (table + offset).astype(np.float32), packing)[0]
    # Where a step leaves them: anywhere else they would have it compiled a second time.
    carry = jax.tree.map(np.float32, initial_carry(DPO(), Control()))
    start, carry = jax.device_put((np.int32(0), carry), layout.replicated)
    moments = layout.place(decoder.config, jax.eval_shape(optimizer.init, weights))
    init = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, moments))
    state = TrainState(start, weights, init(weights), carry)
    losses, norms = [], []
    for _ in range(STEPS):
        state, result = step(state, layout.put(batch))
        losses.append(float(result.metrics["loss"].sum) / len(examples))
        norms.append(float(result.grad_norm))
    moments = optax.tree.get(state.optimizer, "mu")
    last, moments = jax.tree.map(np.asarray, (state.decoder, moments))
    return Outcome(losses, norms, last, moments, table, int(batch.num_microbatches))


def distances(a: Any, b: Any) -> dict[str, float]:
    """The relative distance, in norm, of each tensor of two trees."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return {jax.tree_util.keystr(path): float(np.linalg.norm(x - y) / np.linalg.norm(y)) for (path, x), y in pairs}


def check_same(found: Outcome, wanted: Outcome) -> None:
    np.testing.assert_allclose(found.table, wanted.table, rtol=TOLERANCE)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=TOLERANCE)
    np.testing.assert_allclose(found.grad_norms, wanted.grad_norms, rtol=TOLERANCE)
    for a, b in ((found.weights, wanted.weights), (found.moments, wanted.moments)):
        apart = distances(a, b)
        assert max(apart.values()) < TOLERANCE, apart


def offset_of(examples: list[Example]) -> np.ndarray:
    """As if the policy had been trained a while: margins that are not zero, a different one for each pair."""
    return np.random.default_rng(4).normal(scale=8.0, size=(len(examples), 1, 2))


BASE = Way()


@pytest.fixture(scope="module")
def base(small_decoder: Decoder, pairs: list[Example]) -> Outcome:
    outcome = train(small_decoder, pairs, BASE, offset_of(pairs), None)
    assert outcome.microbatches == 4
    return outcome


def test_the_comparison_is_of_a_training_that_moves(base: Outcome, small_decoder: Decoder) -> None:
    """Losses fall and every tensor is hundreds of tolerances away from where it began."""
    assert base.losses[0] > base.losses[1] > base.losses[2]
    assert base.losses[0] - base.losses[2] > 100 * TOLERANCE
    assert min(distances(base.weights, small_decoder).values()) > 10 * TOLERANCE


ONE_DEVICE = {
    "rows of 128": (Way(row_length=128), 7),
    "rows of 512": (Way(row_length=512), 2),
    "padded": (Way(packed=False), 16),
    "prompts duplicated": (Way(share_prompt=False), 5),
    "2 microbatches": (Way(rows=2), 2),
    "1 microbatch": (Way(rows=4), 1),
    "rematerialised": (Way(remat="full"), 4),
}
# Where the reference's log-probs are computed anew, too; elsewhere the base's serve, which saves compiling.
WHOLE = {"padded", "prompts duplicated", "data 2, fsdp 2, tensor 2", "fsdp 2, sequence 2, tensor 2"}


@pytest.mark.parametrize("name", ONE_DEVICE)
def test_one_device(name: str, small_decoder: Decoder, pairs: list[Example], base: Outcome) -> None:
    way, microbatches = ONE_DEVICE[name]
    found = train(small_decoder, pairs, way, offset_of(pairs), None if name in WHOLE else base.table)
    assert found.microbatches == microbatches
    check_same(found, base)


@contextmanager
def compiled_anew() -> Iterator[None]:
    """Without the compilation cache on disk: what XLA has to say it says when it compiles."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


WARNING = "Involuntary full rematerialization"
MESHES = {
    "data 8": MeshConfig(data=8, fsdp=1, tensor=1),
    "fsdp 8": MeshConfig(data=1, fsdp=8, tensor=1),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data 2, tensor 4": MeshConfig(data=2, fsdp=1, tensor=4),
    "data 2, sequence 4": MeshConfig(data=2, fsdp=1, sequence=4),
    "fsdp 2, sequence 2, tensor 2": MeshConfig(fsdp=2, sequence=2, tensor=2),
}


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices(
    name: str, small_decoder: Decoder, pairs: list[Example], base: Outcome, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same training, and no activation moved whole between devices, which XLA tells on stderr."""
    way = Way(row_length=128, mesh=MESHES[name])
    capfd.readouterr()
    with compiled_anew():
        found = train(small_decoder, pairs, way, offset_of(pairs), None if name in WHOLE else base.table)
    printed = capfd.readouterr().err
    assert WARNING not in printed
    check_same(found, base)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="newer partitioners split this lookup without moving an activation whole"
)
def test_a_rematerialisation_would_be_seen(capfd: pytest.CaptureFixture[str]) -> None:
    """A lookup in a table split along its width, as it would be left to the partitioner."""
    layout = Layout(make_mesh(MESHES["data 2, fsdp 2, tensor 2"]))
    at = NamedSharding(layout.mesh, PartitionSpec("tensor", "fsdp"))
    table = jax.device_put(np.ones((96, 32), np.float32), at)
    tokens = jax.device_put(
        np.zeros((1, 8, 128), np.int32), NamedSharding(layout.mesh, PartitionSpec(None, BATCH_AXES))
    )
    capfd.readouterr()
    with compiled_anew():
        rows = NamedSharding(layout.mesh, PartitionSpec(BATCH_AXES))
        lookup = jax.jit(lambda table, tokens: jax.lax.with_sharding_constraint(table[tokens[0]], rows))
        lookup.lower(table, tokens).compile()
    assert WARNING in capfd.readouterr().err


@pytest.fixture(scope="module")
def stories(shared: Path) -> Decoder:
    return jax.tree.map(np.asarray, load_decoder(read_checkpoint(shared / "models" / "stories260k"), "float32"))


@pytest.fixture(scope="module")
def long_pairs(shared: Path) -> list[Example]:
    """Six pairs of 240 to 440 tokens of small stories, as the model knows them: 2,000 tokens in all."""
    tokenizer = Tokenizer.from_file(str(shared / "models" / "stories260k" / "tokenizer.json"))
    rng = np.random.default_rng(8)

    def ids(n: int) -> np.ndarray:
        heroes, verbs, things = (
            ["Tim", "Lily", "the dog", "Mom"],
            ["saw", "wanted", "found", "had"],
            ["a ball", "a big red box"],
        )
        words = [(rng.choice(heroes), rng.choice(verbs), rng.choice(things)) for _ in range(n // 4)]
        story = "Once upon a time, " + " ".join(f"{a} {b} {c}. They were happy." for a, b, c in words)
        return np.asarray(tokenizer.encode(story).ids[:n], np.int32)

    lengths = [(150, 200, 90), (60, 120, 130), (200, 60, 70), (40, 150, 110), (100, 90, 30), (120, 100, 150)]
    return [Example(f"long:{n}", ids(p), (ids(c), ids(r))) for n, (p, c, r) in enumerate(lengths)]


@pytest.fixture(scope="module")
def long_base(stories: Decoder, long_pairs: list[Example]) -> Outcome:
    outcome = train(stories, long_pairs, Way(row_length=2048), offset_of(long_pairs), None)
    assert outcome.microbatches == 1
    return outcome


REAL = {
    "rows of 512": (Way(row_length=512), 6),
    "rows of 1024": (Way(row_length=1024), 3),
    "2 x 2 x 2 devices": (Way(row_length=512, mesh=MESHES["data 2, fsdp 2, tensor 2"]), 2),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_model(name: str, stories: Decoder, long_pairs: list[Example], long_base: Outcome) -> None:
    """stories260k in rows as long as real ones."""
    way, microbatches = REAL[name]
    found = train(stories, long_pairs, way, offset_of(long_pairs), long_base.table)
    assert found.microbatches == microbatches
    check_same(found, long_base)
