"""The train step against a plain implementation: one example at a time, full logits, jax.grad, optax."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpo.batch import Example, Objective, PackedBatch
from jaxpo.config import AdaptiveBeta, OptimizerConfig
from jaxpo.data.pack import Packing, pack
from jaxpo.models.decoder import Decoder, abstract_decoder
from jaxpo.objectives import DPO, SFT
from jaxpo.objectives.preference import BCOPair
from jaxpo.objectives.score import Scorer, head_blocks
from jaxpo.training.control import Control
from jaxpo.training.optimizer import make_optimizer
from jaxpo.training.step import (
    StepResult,
    TrainState,
    initial_carry,
    make_evaluation_step,
    make_train_step,
    sum_of_shares,
    whole_batch,
)

BETA, RATE, DECAY, CLIP = 0.1, 1e-4, 0.1, 0.5
OPTIMIZER = OptimizerConfig(learning_rate=RATE, schedule="constant", betas=(0.9, 0.95), weight_decay=DECAY)

Step = Callable[[TrainState, PackedBatch], tuple[TrainState, StepResult]]


def on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.array, tree)


def scorer(packing: Packing) -> Scorer:
    return Scorer("float32", "none", head_blocks(packing.row_length, packing.rows, "cpu", 1))


def start(decoder: Decoder) -> tuple[TrainState, optax.GradientTransformation]:
    optimizer = make_optimizer(OPTIMIZER, decoder.config, 10, CLIP)
    weights = on_device(decoder)
    return TrainState(jnp.int32(0), weights, optimizer.init(weights), carry(DPO())), optimizer


def carry(objective: Objective) -> dict[str, jax.Array]:
    return {name: jnp.float32(value) for name, value in initial_carry(objective, Control()).items()}


@pytest.fixture(scope="module")
def references(small_decoder: Decoder, pairs: list[Example]) -> np.ndarray:
    """Log-prob sums of another model: the margins are far from zero."""
    rng = np.random.default_rng(2)
    lengths = np.array([[len(c) for c in e.completions] for e in pairs])
    return (-math.log(96) * lengths + rng.normal(size=lengths.shape) * 5).astype(np.float32)[:, None]


@pytest.fixture(scope="module")
def step(small_decoder: Decoder) -> Step:
    _, optimizer = start(small_decoder)
    # Both take effect in the step after.
    control = Control(AdaptiveBeta(kl_low=1e-3, kl_high=1e-2))
    return jax.jit(make_train_step(DPO(beta=BETA), scorer(Packing(128, 2)), optimizer, control))


LONGEST = 80


def plain_logp(decoder: Decoder, tokens: jax.Array, prompt: jax.Array, end: jax.Array) -> jax.Array:
    """The log-prob of tokens [prompt, end) of a sequence, from the logits of all of it.

    The sequence is padded at its end, where causal attention does not see it, so that one program serves all lengths.
    """

    def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    hidden, _ = decoder.hidden(tokens[None], jnp.arange(LONGEST)[None], causal)
    table = jax.nn.log_softmax(decoder.logits(hidden)[0, :-1])
    logps = jnp.take_along_axis(table, tokens[1:, None], axis=1)[:, 0]
    at = jnp.arange(1, LONGEST)
    return jnp.where((prompt <= at) & (at < end), logps, 0.0).sum()


def sequence(example: Example, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `plain_logp` takes for completion k."""
    tokens = np.zeros(LONGEST, np.int32)
    P, C = len(example.prompt), len(example.completions[k])
    tokens[: P + C] = np.concatenate([example.prompt, example.completions[k]])
    return jnp.asarray(tokens), jnp.int32(P), jnp.int32(P + C)


@jax.jit
@jax.value_and_grad
def plain_loss(decoder: Decoder, chosen: Any, rejected: Any, reference: jax.Array) -> jax.Array:
    """Equation 7 of the DPO paper, written out for one pair."""
    rewards = [BETA * (plain_logp(decoder, *c) - r) for c, r in zip((chosen, rejected), reference, strict=True)]
    return jnp.log1p(jnp.exp(rewards[1] - rewards[0]))


def apart(a: Any, b: Any) -> float:
    """The largest relative distance, in norm, of two trees' tensors."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.linalg.norm(np.asarray(x) - y) / np.linalg.norm(y)) for x, y in pairs)


def first_moments(state: TrainState) -> Any:
    """AdamW's running mean of the gradients."""
    return optax.tree.get(state.optimizer, "mu")


def test_a_step_is_that_of_a_plain_implementation(
    small_decoder: Decoder, pairs: list[Example], references: np.ndarray, step: Step
) -> None:
    few, table = pairs[:6], references[:6]
    decoder = on_device(small_decoder)
    losses, grads = [], jax.tree.map(jnp.zeros_like, decoder)
    for example, reference in zip(few, table, strict=True):
        loss, grad = plain_loss(decoder, sequence(example, 0), sequence(example, 1), jnp.asarray(reference[0]))
        losses.append(float(loss))
        grads = jax.tree.map(lambda total, g: total + g / len(few), grads, grad)
    norm = math.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)))
    clipped = jax.tree.map(lambda g: g * min(1.0, CLIP / norm), grads)

    def updated(path: Any, weight: jax.Array, g: jax.Array) -> jax.Array:
        # AdamW's first step: both bias corrections cancel the betas.
        decay = 0.0 if "norm" in jax.tree_util.keystr(path) else DECAY
        return weight - RATE * (g / (jnp.abs(g) + OPTIMIZER.eps) + decay * weight)

    state, result = step(start(small_decoder)[0], on_device(pack(few, table, Packing(128, 2))[0]))
    assert float(result.metrics["loss"].sum) / len(few) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(result.grad_norm) == pytest.approx(norm, rel=1e-5)
    assert norm > CLIP
    assert bool(result.finite)
    assert int(state.step) == 1
    assert apart(jax.tree.map(lambda m: m / 0.1, first_moments(state)), clipped) < 1e-5
    assert apart(state.decoder, jax.tree_util.tree_map_with_path(updated, decoder, clipped)) < 1e-5


def test_a_fraction_of_the_loss_is_divided_by_the_examples_of_the_whole_batch(
    small_decoder: Decoder, pairs: list[Example], references: np.ndarray, step: Step
) -> None:
    """Rows in one microbatch, or each in its own, with empty ones besides: sums, not an average of averages."""
    packings = [Packing(128, 2), Packing(128, 2, packed=False), Packing(128, 2, microbatches=16)]
    results = []
    for packing in packings:
        batch, _ = pack(pairs, references, packing)
        results.append((int(batch.num_microbatches), *step(start(small_decoder)[0], on_device(batch))))
    assert len({used for used, _, _ in results}) == 2
    _, state, result = results[0]
    distance = result.metrics["kl/abs"]
    assert float(state.carry["kl"]) == pytest.approx(0.1 * float(distance.sum / len(pairs)), rel=1e-5)
    assert float(state.carry["beta_scale"]) == pytest.approx(1.02)
    for _, other_state, other in results[1:]:
        assert float(other.grad_norm) == pytest.approx(float(result.grad_norm), rel=1e-5)
        assert apart(first_moments(other_state), first_moments(state)) < 1e-5
        np.testing.assert_allclose(other_state.carry["kl"], state.carry["kl"], rtol=1e-5)
        np.testing.assert_array_equal(other_state.carry["beta_scale"], state.carry["beta_scale"])
        for name, metric in result.metrics.items():
            np.testing.assert_allclose(other.metrics[name], metric, rtol=1e-5, atol=1e-4, err_msg=name)


def test_gradients_of_halves_add_up_to_the_whole(
    small_decoder: Decoder, pairs: list[Example], references: np.ndarray, step: Step
) -> None:
    """Two batches of half the examples, each with the denominators of the whole, below the clipping limit."""
    quiet = references.copy()
    quiet[:, 0, 0] -= 60.0
    batch, _ = pack(pairs, quiet, Packing(128, 2))
    halves = [
        pack(part, table, Packing(128, 2))[0]._replace(num_examples=batch.num_examples, num_tokens=batch.num_tokens)
        for part, table in ((pairs[:5], quiet[:5]), (pairs[5:], quiet[5:]))
    ]
    whole, result = step(start(small_decoder)[0], on_device(batch))
    assert float(result.grad_norm) < CLIP
    parts = [step(start(small_decoder)[0], on_device(half))[0] for half in halves]
    assert apart(jax.tree.map(jnp.add, *map(first_moments, parts)), first_moments(whole)) < 1e-5


@pytest.mark.parametrize("of", [(sum_of_shares, DPO()), (whole_batch, BCOPair())], ids=["shares", "whole batch"])
def test_gradients_of_layers_never_stand_beside_their_sum(
    small_decoder: Decoder, pairs: list[Example], of: tuple[Any, Objective]
) -> None:
    """Memory for several microbatches is that for one: each layer's gradient is added as it is made.

    Of the embedding, which is small here, one does.
    """
    make, objective = of
    decoder = abstract_decoder(replace(small_decoder.config, num_layers=16, width=128, mlp_width=256), jnp.float32)
    gradients = jax.jit(make(objective, replace(scorer(Packing(128, 1)), remat="full")))

    def bytes_for(count: int) -> int:
        batch, _ = pack(pairs[:count], np.zeros((count, 1, 2), np.float32), Packing(128, 1))
        compiled = gradients.lower(decoder, batch, carry(objective)).compile()
        assert (batch.lengths.shape[0] == 1) == (count == 1)
        found: Any = compiled.memory_analysis()
        return found.temp_size_in_bytes

    weights = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(decoder))
    assert bytes_for(8) - bytes_for(1) < 0.2 * weights


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_told(
    small_decoder: Decoder, pairs: list[Example], references: np.ndarray, step: Step, poison: float
) -> None:
    poisoned = references.copy()
    poisoned[3, 0, 0] = poison
    _, result = step(start(small_decoder)[0], on_device(pack(pairs, poisoned, Packing(128, 2))[0]))
    assert not bool(result.finite)


def test_evaluation_gives_the_metrics_of_the_step(
    small_decoder: Decoder, pairs: list[Example], references: np.ndarray, step: Step
) -> None:
    """Evaluated before the update, the same batch has the same metrics."""
    batch = on_device(pack(pairs, references, Packing(128, 2))[0])
    evaluate = jax.jit(make_evaluation_step(DPO(beta=BETA), scorer(Packing(128, 2))))
    evaluated = evaluate(on_device(small_decoder), batch, carry(DPO()))
    _, result = step(start(small_decoder)[0], batch)
    assert evaluated.keys() == result.metrics.keys()
    for name, metric in result.metrics.items():
        np.testing.assert_allclose(evaluated[name], metric, rtol=1e-5, atol=1e-5, err_msg=name)


def test_sft_is_the_mean_over_the_tokens_of_the_batch(small_decoder: Decoder, pairs: list[Example]) -> None:
    singles = [Example(e.id, e.prompt, e.completions[:1]) for e in pairs[:6]]
    batch, _ = pack(singles, None, Packing(128, 2))
    decoder = on_device(small_decoder)
    evaluate = jax.jit(make_evaluation_step(SFT(), scorer(Packing(128, 2))))
    metrics = evaluate(decoder, on_device(batch), carry(SFT()))
    logp = jax.jit(plain_logp)
    nll = -sum(float(logp(decoder, *sequence(e, 0))) for e in singles)
    tokens = sum(len(e.completions[0]) for e in singles)
    assert float(metrics["loss"].weight) == tokens
    assert float(metrics["loss"].sum) == pytest.approx(nll, rel=1e-5)
