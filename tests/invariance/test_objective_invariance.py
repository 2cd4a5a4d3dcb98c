"""Every objective has one value and one gradient, however its examples are packed, accumulated and sharded.

Losses see small arrays alone, so a way of computing is compiled once, for the scores and for what carries a gradient
back through them (`step.all_scores`, `step.pull_back`), and serves every objective; the train step as a whole is
compiled for one objective of each kind.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from objective_cases import CARRY, CASES, DIFFERENTIABLE, TOTALS

from jaxpo.batch import Completions, Example, Objective, Statistic
from jaxpo.config import AdaptiveBeta, MeshConfig
from jaxpo.data.pack import Packing, assign_rows, pack
from jaxpo.models.decoder import Decoder
from jaxpo.objectives.score import Scorer, Scores, completions_of, head_blocks, microbatch
from jaxpo.training.control import Control
from jaxpo.training.mesh import AXES, Layout, make_mesh
from jaxpo.training.step import (
    TrainState,
    all_scores,
    initial_carry,
    make_evaluation_step,
    make_train_step,
    pull_back,
)

TOLERANCE = 1e-5
ROW_LENGTH = 40
EXAMPLES = 32


@dataclass(frozen=True)
class Way:
    """A way to compute a batch: in so many microbatches; without a mesh, on one device."""

    microbatches: int
    packed: bool = True
    share_prompt: bool = True
    mesh: MeshConfig | None = None


WAYS = {
    "4 microbatches": Way(4),
    "2 microbatches": Way(2),
    "1 microbatch": Way(1),
    "padded": Way(4, packed=False),
    "prompts duplicated": Way(2, share_prompt=False),
    "data 8": Way(2, mesh=MeshConfig(data=8, fsdp=1, tensor=1)),
    "fsdp 8": Way(4, packed=False, mesh=MeshConfig(data=1, fsdp=8, tensor=1)),
    # Chunks of 20 tokens: many answers are on two devices, or on another one than the token that predicts them.
    "2 x 2 x 2": Way(2, share_prompt=False, mesh=MeshConfig(fsdp=2, sequence=2, tensor=2)),
}
BASE = "4 microbatches"
CARRIED = {name: jnp.float32(value) for name, value in CARRY.items()}
KINDS = {"answers": 1, "pairs": 2, "lists": 4, "rewards": 4}


def kind_of(objective: Objective) -> str:
    if "rewards" in objective.statistics:
        return "rewards"
    return next(kind for kind, K in KINDS.items() if objective.num_completions == K)


@pytest.fixture(scope="module")
def examples() -> dict[str, list[Example]]:
    """Thirty-two examples of each kind: soft labels, ratings, lists of two to four answers, answers of one token."""
    rng = np.random.default_rng(11)

    def ids(longest: int) -> np.ndarray:
        return rng.integers(0, 96, rng.integers(1, longest + 1), dtype=np.int32)

    def example(n: int, K: int) -> Example:
        size = K if K < 4 else 2 + n % 3
        answers = [ids(6) if k < size else np.zeros(0, np.int32) for k in range(K)]
        scores = np.sort(rng.uniform(0, 3, K)).astype(np.float32)[::-1]
        return Example(f"{n}", ids(10), tuple(answers), float(rng.choice([1.0, 0.8, 0.0 if K < 2 else 0.6])), scores)

    return {kind: [example(n, K) for n in range(EXAMPLES)] for kind, K in KINDS.items()}


@pytest.fixture(scope="module")
def references(examples: dict[str, list[Example]]) -> dict[str, np.ndarray]:
    """Log-probs [N, 2, K] of a model that is not far from a random one: about ln 96 a token."""
    rng = np.random.default_rng(12)
    found = {}
    for kind, listed in examples.items():
        lengths = np.array([[len(c) for c in e.completions] for e in listed])
        shared = np.minimum(lengths, lengths.min(axis=1, keepdims=True))
        both = np.stack([lengths, shared], axis=1)
        found[kind] = np.where(both > 0, -np.log(96) * both + rng.normal(size=both.shape), 0.0).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def decoders(small_decoder: Decoder) -> dict[str, Decoder]:
    """By kind: the small decoder, and one with a head for rewards."""
    scoring = Decoder(replace(small_decoder.config, head="score"), jax.random.key(1), np.float32)
    return {kind: jax.tree.map(np.asarray, scoring if kind == "rewards" else small_decoder) for kind in KINDS}


def layout_of(way: Way) -> Layout:
    alone = jax.make_mesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:1])
    return Layout(alone if way.mesh is None else make_mesh(way.mesh))


def packing_of(way: Way, listed: list[Example], score_prompt: bool) -> Packing:
    """Rows in a microbatch such that there are as many microbatches as the way says."""
    devices = layout_of(way).batch_devices
    packing = Packing(ROW_LENGTH, 1, way.packed, way.share_prompt, score_prompt=score_prompt, devices=devices)
    # Duplicated prompts take more room than a row of the others has.
    packing = packing if way.share_prompt else replace(packing, row_length=2 * ROW_LENGTH)
    prompts, completions = (
        np.array([len(e.prompt) for e in listed]),
        np.array([[len(c) for c in e.completions] for e in listed]),
    )
    rows = len(assign_rows(packing.size(prompts, completions).tolist(), packing.row_length)) if way.packed else EXAMPLES
    return replace(packing, rows=-(-rows // (way.microbatches * devices)) * devices)


def scorer_of(layout: Layout, packing: Packing, kind: str, objective: Objective | None = None) -> Scorer:
    """One that gives all there is, unless it is for one objective."""
    everything: frozenset[Statistic] = frozenset(
        {"rewards"} if kind == "rewards" else {"shared", "confidence", "prompt"}
    )
    return Scorer(
        compute_dtype="float32",
        remat="none",
        blocks=head_blocks(
            packing.row_length // layout.row_devices, packing.rows // layout.batch_devices, "cpu", layout.mesh.size
        ),
        statistics=everything if objective is None else objective.statistics,
        devices=layout,
    )


class Computed(NamedTuple):
    """A batch as a way computes it.

    slots: what an objective sees of it, in slots; at: the slot of each example. gradient: from slopes of scores.
    """

    shape: tuple[int, ...]
    at: np.ndarray
    slots: Completions
    scores: Scores
    gradient: Callable[[Scores], Any]


class Outcome(NamedTuple):
    loss: float
    metrics: dict[str, tuple[float, float]]
    gradient: Any


class Bench:
    """Computes every objective in every way; what is compiled for a way and a kind serves all of its objectives."""

    def __init__(self, decoders: dict[str, Decoder], examples: Any, references: Any):
        self.decoders, self.examples, self.references = decoders, examples, references
        self.computed: dict[tuple[str, str, bool], Computed] = {}
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self.losses: dict[str, Any] = {}

    def compute(self, name: str, kind: str, score_prompt: bool) -> Computed:
        if (name, kind, score_prompt) in self.computed:
            return self.computed[name, kind, score_prompt]
        way, listed = WAYS[name], self.examples[kind]
        layout, packing = layout_of(way), packing_of(way, listed, score_prompt)
        batch, places = pack(listed, self.references[kind], packing)
        if kind != "answers" and not score_prompt:
            assert int(batch.num_microbatches) == way.microbatches
        assert max(place.slot for place in places) == 0 or way.packed
        placed, scorer = layout.put(batch), scorer_of(layout, packing, kind)
        weights = jax.device_put(self.decoders[kind], layout.decoder(self.decoders[kind].config, self.decoders[kind]))
        # With prompts scored or not the shapes are the same, and so is the program.
        forward, backward = self._programs(name, kind, scorer)
        scores = forward(weights, placed)
        slots = completions_of(jax.tree.map(np.asarray, scores), jax.tree.map(np.asarray, batch), CARRIED)
        shape = batch.lengths.shape
        at = np.array([np.ravel_multi_index(place, shape[:3]) for place in places])
        in_slots = jax.tree.map(np.asarray, slots)
        found = Computed(shape, at, in_slots, scores, lambda slopes: backward(weights, placed, slopes))
        self.computed[name, kind, score_prompt] = found
        return found

    def _programs(self, name: str, kind: str, scorer: Scorer) -> tuple[Any, Any]:
        key = f"{name} {kind}"
        if key not in self.losses:
            self.losses[key] = (
                jax.jit(lambda d, b: all_scores(scorer, d, b)),
                jax.jit(lambda d, b, s: pull_back(scorer, d, b, s)),
            )
        return self.losses[key]

    def outcome(self, name: str, case: str) -> Outcome:
        """Of one objective in one way."""
        if (name, case) not in self.outcomes:
            objective = CASES[case]
            one = self.compute(name, kind_of(objective), "prompt" in objective.statistics)
            self.outcomes[name, case] = evaluate(self._loss(case), objective, one)
        return self.outcomes[name, case]

    def _loss(self, case: str) -> Any:
        if case not in self.losses:

            def share(inputs: dict[str, jax.Array], c: Completions) -> tuple[jax.Array, Any]:
                return CASES[case](c._replace(**inputs))

            self.losses[case] = jax.jit(jax.value_and_grad(share, has_aux=True))
        return self.losses[case]


def evaluate(loss_of: Any, objective: Objective, one: Computed) -> Outcome:
    """The loss of the examples in the order of the data, and its gradient through the slots that they lie in."""
    K, shape, at = objective.num_completions, one.shape, one.at

    def in_order(value: np.ndarray) -> np.ndarray:
        return value[at][:, :K] if value.ndim == 2 else value[at]

    ordered = {name: in_order(value) for name, value in one.slots._asdict().items() if name not in TOTALS}
    c = one.slots._replace(**ordered, num_tokens=one.slots.num_tokens[: 1 + K])
    inputs = {name: getattr(c, name) for name in DIFFERENTIABLE}
    (loss, metrics), slopes = loss_of(inputs, c)

    def scattered(field: str, width: int, first: int) -> np.ndarray:
        values = np.zeros((int(np.prod(shape[:3])), width), np.float32)
        values[at, first : first + K] = slopes[field]
        return values

    B = shape[3]
    logps = scattered("logps", B, 1)
    logps[at, 0] = slopes["prompt_logps"]
    nothing = np.zeros(shape, np.float32)
    fields: dict[str, Any] = {
        "logps": logps.reshape(shape),
        "correct": nothing,
        "shared": scattered("shared_logps", B, 1).reshape(shape),
        "confidence": nothing,
        "rewards": scattered("rewards", B - 1, 0).reshape(*shape[:3], B - 1),
    }
    of_scores = Scores(**fields)
    placed = jax.tree.map(lambda slope, score: jax.device_put(slope, score.sharding), of_scores, one.scores)
    gradient = jax.tree.map(np.asarray, one.gradient(placed))
    sums = {name: (float(m.sum), float(m.weight)) for name, m in metrics.items()}
    return Outcome(float(loss), sums, gradient)


@pytest.fixture(scope="module")
def bench(decoders: Any, examples: Any, references: Any) -> Bench:
    return Bench(decoders, examples, references)


def distances(a: Any, b: Any) -> dict[str, float]:
    """The relative distance, in norm, of each tensor of two trees."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return {
        jax.tree_util.keystr(path): float(np.linalg.norm(x - y) / (np.linalg.norm(y) or 1.0)) for (path, x), y in pairs
    }


@pytest.mark.parametrize("name", [name for name in WAYS if name != BASE])
def test_every_objective_is_the_same_in_every_way(name: str, bench: Bench) -> None:
    apart: dict[str, float] = {}
    for case in CASES:
        found, wanted = bench.outcome(name, case), bench.outcome(BASE, case)
        assert found.loss == pytest.approx(wanted.loss, rel=TOLERANCE), case
        for metric, (total, weight) in wanted.metrics.items():
            assert found.metrics[metric][1] == pytest.approx(weight, rel=TOLERANCE), (case, metric)
            largest = TOLERANCE * (abs(total) + weight)
            assert found.metrics[metric][0] == pytest.approx(total, abs=largest), (case, metric)
        assert any(np.any(leaf) for leaf in jax.tree.leaves(wanted.gradient)), case
        apart[case] = max(distances(found.gradient, wanted.gradient).values())
    assert max(apart.values()) < TOLERANCE, {case: far for case, far in apart.items() if far >= TOLERANCE}


@pytest.mark.parametrize("kind", ["pairs", "answers"])
def test_two_passes_give_the_gradient_of_one_big_batch(kind: str, bench: Bench, decoders: Any) -> None:
    """Objectives that couple the examples of a batch: in four microbatches, against jax.grad of all at once."""
    cases = {name: objective for name, objective in CASES.items() if objective.couples_examples}
    cases = {name: objective for name, objective in cases.items() if kind_of(objective) == kind}
    assert cases
    way = Way(1)
    layout, packing = layout_of(way), packing_of(way, bench.examples[kind], True)
    batch, _ = pack(bench.examples[kind], bench.references[kind], packing)
    assert int(batch.num_microbatches) == 1
    scorer = scorer_of(layout, packing, kind)

    def losses(decoder: Decoder, batch: Any) -> jax.Array:
        c = completions_of(scorer(decoder, microbatch(batch, jnp.int32(0))), batch, CARRIED)
        return jnp.stack([objective(c)[0] for objective in cases.values()])

    weights = jax.tree.map(jnp.asarray, decoders[kind])
    gradients = jax.jit(jax.jacrev(losses))(weights, jax.tree.map(jnp.asarray, batch))
    for n, case in enumerate(cases):
        wanted = jax.tree.map(lambda leaf, n=n: np.asarray(leaf[n]), gradients)
        apart = distances(bench.outcome(BASE, case).gradient, wanted)
        assert max(apart.values()) < TOLERANCE, (case, apart)


# A sum of shares, coupled examples with all that is carried, and a decoder that gives rewards.
REPRESENTATIVES = ["dpo, many modifiers", "mpo", "reward of lists"]
CONTROL = Control(AdaptiveBeta(kl_low=0.01, kl_high=0.02))


@pytest.mark.parametrize("name", [BASE, "2 x 2 x 2"])
@pytest.mark.parametrize("case", REPRESENTATIVES)
def test_the_jitted_step_is_what_its_parts_are(case: str, name: str, bench: Bench) -> None:
    """Loss, metrics, gradient, update and what is carried on, of the whole step in one program."""
    objective: Any = CASES[case]
    kind, way = kind_of(objective), WAYS[name]
    layout, packing = layout_of(way), packing_of(way, bench.examples[kind], "prompt" in objective.statistics)
    decoder = bench.decoders[kind]
    batch, _ = pack(bench.examples[kind], bench.references[kind], packing)
    optimizer = optax.sgd(1e-2, momentum=0.9)
    scorer = scorer_of(layout, packing, kind, objective)
    step = jax.jit(make_train_step(objective, scorer, optimizer, CONTROL))
    weights = jax.device_put(decoder, layout.decoder(decoder.config, decoder))
    carry = {key: CARRIED[key] for key in initial_carry(objective, CONTROL)}
    start, placed = (jax.device_put(tree, layout.replicated) for tree in (np.int32(0), carry))
    state, result = step(TrainState(start, weights, optimizer.init(weights), placed), layout.put(batch))

    wanted = bench.outcome(BASE, case)
    gradient = jax.tree.map(np.asarray, optax.tree.get(state.optimizer, "trace"))
    apart = distances(gradient, wanted.gradient)
    assert max(apart.values()) < TOLERANCE, apart
    norm = np.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(wanted.gradient)))
    assert float(result.grad_norm) == pytest.approx(norm, rel=TOLERANCE)
    assert bool(result.finite)
    for metric, (total, weight) in wanted.metrics.items():
        found = result.metrics[metric]
        assert float(found.weight) == pytest.approx(weight, rel=TOLERANCE), metric
        assert float(found.sum) == pytest.approx(total, abs=TOLERANCE * (abs(total) + weight)), metric
    for before, after, slope in zip(*map(jax.tree.leaves, (decoder, state.decoder, gradient)), strict=True):
        np.testing.assert_allclose(after, before - 1e-2 * slope, rtol=1e-6, atol=1e-7)
    carried = {**CONTROL.next_carry(carry, result.metrics), **objective.next_carry(carry, result.metrics)}
    assert state.carry.keys() == carry.keys() == carried.keys()
    for key, value in carried.items():
        assert float(state.carry[key]) == pytest.approx(float(value), rel=1e-6), key
    moved = {key for key, value in state.carry.items() if float(value) != float(carry[key])}
    assert moved == (set(carry) if case != "reward of lists" else set())
    assert int(state.step) == 1


def test_an_evaluation_of_the_batch_gives_its_metrics(bench: Bench) -> None:
    """With every beta as it is configured, whatever the run has made of it since."""
    objective: Any = CASES["mpo"]
    way, listed = WAYS["2 microbatches"], bench.examples["pairs"]
    layout, packing = layout_of(way), packing_of(way, listed, True)
    batch, _ = pack(listed, bench.references["pairs"], packing)
    step = jax.jit(make_evaluation_step(objective, scorer_of(layout, packing, "pairs", objective)))
    found = step(jax.device_put(bench.decoders["pairs"], layout.replicated), layout.put(batch), CARRIED)
    slots = bench.compute(BASE, "pairs", True).slots
    _, wanted = objective(slots._replace(carry={**CARRIED, "beta_scale": jnp.float32(1.0)}))
    for name, (total, weight) in wanted.items():
        assert float(found[name].weight) == pytest.approx(float(weight), rel=TOLERANCE), name
        largest = TOLERANCE * (abs(float(total)) + float(weight))
        assert float(found[name].sum) == pytest.approx(float(total), abs=largest), name
