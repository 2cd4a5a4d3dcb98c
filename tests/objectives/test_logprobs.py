"""Log-probs without logits against a plain log-softmax: values, gradients, and what the compiled program holds."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.objectives.logprobs import Blocks, TokenScores, token_scores

R, S, D, V = 2, 24, 8, 97
EIGHT = Blocks((8,))
# Of one size and of several, one larger than the row; all words at once and so many that the last block overlaps.
BLOCKS = [Blocks((1,)), EIGHT, Blocks((S,)), Blocks((96, 8, 2), 97), Blocks((4,), 10), Blocks((12, 3), 40)]
blocks_of_all_kinds = pytest.mark.parametrize("blocks", BLOCKS, ids=str)


def inputs(dtype: type = np.float32, scale: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(5)
    hidden = scale * rng.normal(size=(R, S, D))
    head = rng.normal(size=(V, D))
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(rng.integers(0, V, (R, S)), jnp.int32)


def naive(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
    logps = jax.nn.log_softmax(jnp.einsum("rsd,vd->rsv", hidden, head))
    return jnp.take_along_axis(logps, labels[..., None], axis=-1)[..., 0]


def gradients(
    logps: Callable[[jax.Array, jax.Array], jax.Array], hidden: jax.Array, head: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of a weighted sum, so that every token's gradient is a different one; a weight may be negative, as in DPO."""
    return jax.jit(jax.grad(lambda h, w: (weights * logps(h, w)).sum(), argnums=(0, 1)))(hidden, head)


WEIGHTS = jnp.asarray(np.random.default_rng(6).normal(size=(R, S)), jnp.float32)


@pytest.mark.parametrize("used", [S, 13, 8, 1, 0])
@blocks_of_all_kinds
def test_value_and_gradient_are_those_of_log_softmax(blocks: Blocks, used: int) -> None:
    hidden, head, labels = inputs()
    inside = jnp.arange(S) < used
    found = jax.jit(token_scores, static_argnums=4)(hidden, head, labels, jnp.int32(used), blocks)
    expected = naive(hidden, head, labels)
    np.testing.assert_allclose(found.logps[:, :used], expected[:, :used], rtol=1e-5, atol=1e-5)
    assert not np.any(found.logps[:, used:])
    assert not np.any(found.correct[:, used:])

    ours = gradients(lambda h, w: token_scores(h, w, labels, jnp.int32(used), blocks).logps, hidden, head, WEIGHTS)
    # A column that is not used puts out 0, whatever it weighs.
    plain = gradients(lambda h, w: naive(h, w, labels), hidden, head, jnp.where(inside, WEIGHTS, 0.0))
    for mine, wanted in zip(ours, plain, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5)
    assert not np.any(ours[0][:, used:])
    assert bool(np.any(ours[1])) == (used > 0)


def test_correct_marks_the_labels_that_were_likeliest() -> None:
    hidden, head, labels = inputs()
    likeliest = jnp.einsum("rsd,vd->rsv", hidden, head).argmax(-1)
    labels = jnp.where(jnp.arange(S) % 3 == 0, likeliest, labels)
    scores = token_scores(hidden, head, labels, jnp.int32(S), EIGHT)
    np.testing.assert_array_equal(scores.correct, labels == likeliest)
    assert 8 * R <= float(scores.correct.sum()) < S * R


@pytest.mark.parametrize("used", [S, 13, 1])
@blocks_of_all_kinds
def test_confidence_is_the_label_against_a_token_drawn_from_the_policy(blocks: Blocks, used: int) -> None:
    """log p(label) - log sum_v p(v)^2, from float64 probabilities."""
    hidden, head, labels = inputs()
    found = jax.jit(token_scores, static_argnums=(4, 5))(hidden, head, labels, jnp.int32(used), blocks, True)
    assert found.confidence is not None
    logits = np.einsum("rsd,vd->rsv", np.asarray(hidden, np.float64), np.asarray(head, np.float64))
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    wanted = np.log(np.take_along_axis(p, np.asarray(labels)[..., None], -1)[..., 0]) - np.log((p**2).sum(axis=-1))
    np.testing.assert_allclose(found.confidence[:, :used], wanted[:, :used], rtol=1e-5, atol=1e-5)
    assert not np.any(np.asarray(found.confidence)[:, used:])
    assert np.exp(wanted).min() < 0.1
    assert np.exp(wanted).max() > 1.0


def test_confidence_changes_neither_log_probs_nor_gradients_and_has_none() -> None:
    hidden, head, labels = inputs()
    plain, more = (token_scores(hidden, head, labels, jnp.int32(S), EIGHT, wanted) for wanted in (False, True))
    assert plain.confidence is None
    np.testing.assert_array_equal(plain.logps, more.logps)
    np.testing.assert_array_equal(plain.correct, more.correct)

    def of(wanted: bool, part: str) -> tuple[jax.Array, jax.Array]:
        return gradients(
            lambda h, w: getattr(token_scores(h, w, labels, jnp.int32(S), EIGHT, wanted), part), hidden, head, WEIGHTS
        )

    for a, b in zip(of(False, "logps"), of(True, "logps"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(np.any(g) for g in of(True, "confidence"))


@pytest.mark.parametrize("used", [S, 13])
def test_large_logits_stay_finite(used: int) -> None:
    """Also those of columns that are computed, for they share a block with used ones, and that nobody scores."""
    hidden, head, labels = inputs(scale=1e4)
    scores = token_scores(hidden, head, labels, jnp.int32(used), EIGHT, True)
    np.testing.assert_allclose(scores.logps[:, :used], naive(hidden, head, labels)[:, :used], rtol=1e-5, atol=1e-5)
    assert scores.confidence is not None
    assert np.all(np.isfinite(scores.confidence))
    found = gradients(lambda h, w: token_scores(h, w, labels, jnp.int32(used), EIGHT).logps, hidden, head, WEIGHTS)
    assert all(np.all(np.isfinite(g)) for g in found)


def test_bfloat16_inputs_make_float32_logits() -> None:
    """Bfloat16 products are summed in float32: no error beyond that of rounding the inputs, unlike bfloat16 logits."""
    hidden, head, labels = inputs(jnp.bfloat16)
    exact_hidden, exact_head = hidden.astype(jnp.float32), head.astype(jnp.float32)
    scores = token_scores(hidden, head, labels, jnp.int32(S), EIGHT)
    assert isinstance(scores, TokenScores)
    assert scores.logps.dtype == jnp.float32
    exact = naive(exact_hidden, exact_head, labels)
    np.testing.assert_allclose(scores.logps, exact, rtol=1e-5, atol=1e-5)
    assert np.abs(naive(hidden, head, labels).astype(jnp.float32) - exact).max() > 1e-2

    found = gradients(lambda h, w: token_scores(h, w, labels, jnp.int32(S), EIGHT).logps, hidden, head, WEIGHTS)
    wanted = gradients(lambda h, w: naive(h, w, labels), exact_hidden, exact_head, WEIGHTS)
    for mine, expected in zip(found, wanted, strict=True):
        assert mine.dtype == jnp.bfloat16
        assert np.linalg.norm(mine.astype(jnp.float32) - expected) < 1e-2 * np.linalg.norm(expected)


def test_blocks_must_divide_the_scored_tokens_and_each_other() -> None:
    with pytest.raises(ValueError, match="blocks of 7 do not divide 24"):
        token_scores(*inputs(), jnp.int32(S), Blocks((14, 7)))
    with pytest.raises(ValueError, match="each size must be a multiple of the next"):
        token_scores(*inputs(), jnp.int32(S), Blocks((12, 8)))


def test_the_head_s_gradient_keeps_its_own_precision() -> None:
    """Of a float32 head beside bfloat16 hidden states, as a policy has them."""
    hidden, _, labels = inputs(jnp.bfloat16)
    _, head, _ = inputs()
    for blocks in (EIGHT, Blocks((4,), 10)):
        _, found = gradients(
            lambda h, w, b=blocks: token_scores(h, w, labels, jnp.int32(S), b).logps, hidden, head, WEIGHTS
        )
        assert found.dtype == jnp.float32
        rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
        _, wanted = gradients(lambda h, w: naive(h, w, labels), hidden.astype(jnp.float32), rounded, WEIGHTS)
        assert np.linalg.norm(found - wanted) < 5e-3 * np.linalg.norm(wanted)
        assert np.any(found != found.astype(jnp.bfloat16).astype(jnp.float32))


@blocks_of_all_kinds
def test_a_head_that_is_not_differentiated_costs_no_gradient(blocks: Blocks) -> None:
    """As where adapters are trained: the same gradient of the hidden states, by three products and not four."""
    hidden, head, labels = inputs()

    def gradient(argnums: int | tuple[int, ...]) -> Any:
        def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return (WEIGHTS * token_scores(hidden, head, labels, jnp.int32(13), blocks).logps).sum()

        return jax.jit(jax.grad(loss, argnums))

    frozen, learning = gradient(0), gradient((0, 1))
    np.testing.assert_array_equal(frozen(hidden, head), learning(hidden, head)[0])
    products = [one.lower(hidden, head).as_text().count("stablehlo.dot_general") for one in (frozen, learning)]
    assert 4 * products[0] == 3 * products[1] > 0


def arrays(program: str) -> list[int]:
    """The sizes of all arrays in a compiled program."""
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program)
    return [int(np.prod([int(n) for n in dims.split(",")])) for dims in shapes]


def compiled(logps: Callable[[jax.Array, jax.Array], jax.Array]) -> str:
    hidden, head, _ = inputs()
    gradient = jax.value_and_grad(lambda h, w: (WEIGHTS * logps(h, w)).sum(), argnums=(0, 1))
    return jax.jit(gradient).lower(hidden, head).compile().as_text() or ""


def test_the_compiled_program_holds_logits_of_one_block_only() -> None:
    labels = inputs()[2]

    def largest(blocks: Blocks) -> int:
        """Of what may be logits: a fusion may flatten its axes, so what counts is that a word's prime is a factor."""
        sizes = arrays(compiled(lambda h, w: token_scores(h, w, labels, jnp.int32(S), blocks).logps))
        return max(size for size in sizes if size % (blocks.words or V) == 0)

    assert largest(Blocks((6,))) == R * 6 * V
    # The head itself is larger than the logits of so few words, but has not this number of them as a factor.
    assert largest(Blocks((12, 4), 31)) == R * 12 * 31
    plain = compiled(lambda h, w: naive(h, w, labels))
    assert max(size for size in arrays(plain) if size % V == 0) == R * S * V
