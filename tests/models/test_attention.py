import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.models.attention import packed_attention, visible

# Two prompts with two completions each, and padding.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]])
BRANCHES = np.array([[0, 0, 0, 1, 1, 2, 2, 0, 0, 1, 2, 2, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 4, 3, 4, 0, 1, 2, 2, 3, 0, 0]])
T = SEGMENTS.shape[1]


def heads(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = jax.random.split(jax.random.key(seed), 3)
    shape = (1, T, 2, 8)
    return jax.random.normal(q, (1, T, 4, 8)), jax.random.normal(k, shape), jax.random.normal(v, shape)


def naive(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> np.ndarray:
    """Softmax attention in float64, one query at a time over the keys listed one by one."""
    q64, k64, v64 = (np.asarray(x, np.float64)[0] for x in (q, k, v))
    segments, branches, positions = SEGMENTS[0], BRANCHES[0], POSITIONS[0]
    out = np.zeros_like(q64)
    for i in range(T):
        if segments[i] == 0:
            continue
        keys = [
            j
            for j in range(i + 1)
            if segments[j] == segments[i]
            and branches[j] in (0, branches[i])
            and (window is None or positions[i] - positions[j] < window)
        ]
        for n in range(4):
            scores = k64[keys, n // 2] @ q64[i, n] / np.sqrt(8)
            weights = np.exp(scores - scores.max())
            out[i, n] = weights @ v64[keys, n // 2] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 3])
def test_equals_attention_over_each_token_s_own_context(window: int | None) -> None:
    q, k, v = heads()
    out = packed_attention(q, k, v, jnp.asarray(SEGMENTS), jnp.asarray(BRANCHES), jnp.asarray(POSITIONS), window)
    np.testing.assert_allclose(out[0], naive(q, k, v, window), rtol=1e-5, atol=1e-6)


def test_window_counts_positions_not_places() -> None:
    arrays = [jnp.asarray(a) for a in (SEGMENTS, BRANCHES, POSITIONS)]
    seen = visible(*arrays, window=3)[0]
    # The first token of completion 2 (place 5, position 3) sees prompt positions 1 and 2, for all that lies between.
    assert np.flatnonzero(seen[5]).tolist() == [1, 2, 5]


def test_padding_puts_out_zero_and_passes_no_gradient() -> None:
    q, k, v = heads()
    nothing = jnp.zeros_like(jnp.asarray(SEGMENTS))

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(packed_attention(q, k, v, nothing, nothing, nothing)))

    value, gradients = jax.value_and_grad(total, (0, 1, 2))(q, k, v)
    assert value == 0
    assert all(np.all(np.asarray(g) == 0) for g in gradients)


def test_probabilities_are_not_kept_for_the_backward_pass() -> None:
    q, k, v = heads()
    segments, branches, positions = (jnp.asarray(a) for a in (SEGMENTS, BRANCHES, POSITIONS))
    _, pull = jax.vjp(lambda q, k, v: packed_attention(q, k, v, segments, branches, positions), q, k, v)
    kept = [np.shape(leaf) for leaf in jax.tree.leaves(pull)]
    assert (1, T, 4, 8) in kept, "the queries are kept"
    assert not [shape for shape in kept if shape.count(T) > 1]
