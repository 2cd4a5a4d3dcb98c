from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.config import ModelConfig
from jaxpo.models.attention import Context, Implementation, choose, cudnn, packed_attention, splash, why_not
from jaxpo.models.attention.context import visible
from jaxpo.models.attention.interface import IMPLEMENTATIONS

# Two prompts with two completions each, and padding.
SEGMENTS = [[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]]
BRANCHES = [[0, 0, 0, 1, 1, 2, 2, 0, 0, 1, 2, 2, 0, 0]]
POSITIONS = [[0, 1, 2, 3, 4, 3, 4, 0, 1, 2, 2, 3, 0, 0]]
SHORT = Context(*map(jnp.asarray, (SEGMENTS, BRANCHES, POSITIONS)))
N, K, H = 4, 2, 8

# All that run here: cuDNN needs a GPU.
every = pytest.mark.parametrize("implementation", ["dense", "blocked", "splash"])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The TPU's kernel runs as plain JAX."""
    monkeypatch.setitem(IMPLEMENTATIONS, "splash", partial(splash.attention, interpret=True))


def rows(T: int, examples: list[list[tuple[int, ...]]]) -> Context:
    """Rows of examples, each given as the lengths of its prompt and of its completions."""
    fields = np.zeros((3, len(examples), T), np.int32)
    for r, row in enumerate(examples):
        start = 0
        for segment, (P, *completions) in enumerate(row, start=1):
            for branch, length in enumerate((P, *completions)):
                span = slice(start, start + length)
                fields[0, r, span], fields[1, r, span] = segment, branch
                fields[2, r, span] = np.arange(length) + (P if branch else 0)
                start += length
        assert start <= T
    return Context(*map(jnp.asarray, fields))


# Examples that end at the edge of a tile, before it and after it; some longer than a tile, and one of them the
# whole row; lists; a row of padding; a row that is no multiple of a tile.
LAYOUTS = {
    "short": SHORT,
    "edges": rows(384, [[(100, 20, 8), (64, 64), (120, 5, 3)], [(128, 128, 127)], []]),
    "long": rows(300, [[(150, 80, 70)], [(10, 20), (3, 250, 5)], [(300,)]]),
    "many": rows(513, [[(9, 5, 3, 7, 2)] * 19, [(1, 1, 1)] * 171, [(1, 511, 1)]]),
}
layouts = pytest.mark.parametrize("context", LAYOUTS.values(), ids=LAYOUTS)


def heads(context: Context, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Queries, keys, values and a gradient of the output."""
    R, T = context.segments.shape
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(R, T, N, H), (R, T, K, H), (R, T, K, H), (R, T, N, H)]
    q, k, v, d = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return tuple(x.astype(dtype) for x in (3.0 * q, k, v, d))


def value_and_gradients(implementation: Implementation, context: Context, window: int | None, *arrays: jax.Array):
    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, d: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(
            lambda q, k, v: packed_attention(q, k, v, context, window, implementation=implementation), q, k, v
        )
        return out, *pull(d)

    return both(*arrays)


def oracle(context: Context, window: int | None, *arrays: jax.Array) -> list[np.ndarray]:
    """Softmax attention and its gradients in float64, one query at a time over the keys listed one by one."""
    q, k, v, d = (np.asarray(x, np.float64) for x in arrays)
    out, d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for r, (segments, branches, positions) in enumerate(zip(*map(np.asarray, context), strict=True)):
        for i in np.flatnonzero(segments):
            own = (segments == segments[i]) & ((branches == 0) | (branches == branches[i]))
            own &= np.arange(len(segments)) <= i
            keys = np.flatnonzero(own & (window is None or positions[i] - positions < window))
            for n in range(N):
                g = n // (N // K)
                scores = k[r, keys, g] @ q[r, i, n] / np.sqrt(H)
                p = np.exp(scores - scores.max())
                p /= p.sum()
                out[r, i, n] = p @ v[r, keys, g]
                d_p = v[r, keys, g] @ d[r, i, n]
                d_scores = p * (d_p - p @ d_p) / np.sqrt(H)
                d_q[r, i, n] = d_scores @ k[r, keys, g]
                d_k[r, keys, g] += np.outer(d_scores, q[r, i, n])
                d_v[r, keys, g] += np.outer(p, d[r, i, n])
    return [out, d_q, d_k, d_v]


@every
@layouts
@pytest.mark.parametrize("window", [None, 3])
def test_value_and_gradients_in_float64(implementation: Implementation, context: Context, window: int | None) -> None:
    arrays = heads(context)
    found = value_and_gradients(implementation, context, window, *arrays)
    for got, wanted in zip(found, oracle(context, window, *arrays), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@every
@layouts
def test_pieces_of_a_row_are_the_row(implementation: Implementation, context: Context) -> None:
    """Two of them at once, which do not follow each other, and the rest of the row; what is of the keys adds up."""
    q, k, v, d = heads(context)
    T, window = context.segments.shape[1], 5
    number = next(n for n in (5, 3, 4, 2) if T % n == 0)
    size = T // number

    @jax.jit
    def of_pieces(pieces: jax.Array, q: jax.Array, d: jax.Array) -> tuple[jax.Array, ...]:
        attend = partial(packed_attention, context=context, window=window, pieces=pieces, implementation=implementation)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d)

    def at(pieces: list[int]) -> np.ndarray:
        return np.concatenate([np.arange(n * size, (n + 1) * size) for n in pieces])

    ends, middle = [0, number - 1], list(range(1, number - 1))
    parts = {name: np.zeros(x.shape) for name, x in (("out", q), ("q", q), ("k", k), ("v", v))}
    for pieces in filter(None, (ends, middle)):
        here = at(pieces)
        out, d_q, d_k, d_v = of_pieces(size * jnp.array(pieces), q[:, here], d[:, here])
        parts["out"][:, here], parts["q"][:, here] = out, d_q
        parts["k"] += d_k
        parts["v"] += d_v
    for got, wanted in zip(parts.values(), oracle(context, window, q, k, v, d), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@every
@layouts
def test_bfloat16_is_as_near_as_its_inputs(implementation: Implementation, context: Context) -> None:
    arrays = heads(context, jnp.bfloat16)
    found = value_and_gradients(implementation, context, None, *arrays)
    for got, wanted in zip(found, oracle(context, None, *arrays), strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(got, np.float64) - wanted) <= 1e-2 * np.linalg.norm(wanted)


@every
def test_no_token_reads_a_neighbour_a_sibling_or_padding(implementation: Implementation) -> None:
    """Change everything of one branch, or of the padding: what cannot see it stays as it was, bit for bit."""
    context = LAYOUTS["edges"]
    q, k, v, _ = heads(context)
    attend = jax.jit(lambda k, v: packed_attention(q, k, v, context, None, implementation=implementation))
    before = np.asarray(attend(k, v))
    for segment in (0, 1, 2, 3):
        for branch in (0, 1, 2):
            changed = (context.segments == segment) & (context.branches == branch)
            if not changed.any():
                continue
            after = np.asarray(attend(*(jnp.where(changed[..., None, None], 7.0 + x, x) for x in (k, v))))
            sees = (context.segments == segment) & ((context.branches == branch) | (branch == 0))
            # A row without that segment does not change either, nor does what comes before the branch.
            np.testing.assert_array_equal(after[~sees], before[~sees])
            if segment:
                first = np.argwhere(changed)[0]
                assert np.any(after[tuple(first)] != before[tuple(first)]), "the change can be seen at all"


def test_window_counts_positions_not_places() -> None:
    row = Context(*(field[0] for field in SHORT))
    places = jnp.arange(len(SEGMENTS[0]))
    seen = visible(row, places, row, places, 3)
    # The first token of completion 2 (place 5, position 3) sees prompt positions 1 and 2, for all that lies between.
    assert np.flatnonzero(seen[5]).tolist() == [1, 2, 5]


@every
def test_padding_puts_out_zero_and_passes_no_gradient(implementation: Implementation) -> None:
    nothing = Context(*(jnp.zeros((1, 200), jnp.int32),) * 3)
    found = value_and_gradients(implementation, nothing, None, *heads(nothing))
    assert all(np.all(np.asarray(x) == 0) for x in found)


@every
def test_probabilities_are_not_kept_for_the_backward_pass(implementation: Implementation) -> None:
    context = LAYOUTS["edges"]
    q, k, v, _ = heads(context)
    R, T = context.segments.shape
    _, pull = jax.vjp(lambda q, k, v: packed_attention(q, k, v, context, None, implementation=implementation), q, k, v)
    kept = [leaf for leaf in jax.tree.leaves(pull) if np.ndim(leaf)]
    assert max(leaf.size for leaf in kept if leaf.dtype == q.dtype) >= R * T * N * H, "the queries are kept"
    # Rows may have been filled up.
    assert not [leaf.shape for leaf in kept if sum(size >= T for size in leaf.shape) > 1]


def test_keys_of_other_segments_are_not_computed() -> None:
    """Not a number in a key spreads to every query that meets it, also with a weight of 0."""
    context = LAYOUTS["edges"]
    q, k, v, _ = heads(context)
    k = k.at[0, :128].set(jnp.nan)
    out = np.asarray(packed_attention(q, k, v, context, None, implementation="blocked"))
    # The first example of the first row has 128 tokens.
    assert np.isnan(out[0, :128]).all()
    assert np.isfinite(out[0, 128:]).all()
    assert np.isfinite(out[1:]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_token_s_output_does_not_depend_on_where_it_lies(dtype: Any) -> None:
    """To the bit, so that a reference computed in other rows is the same."""
    alone, later = rows(200, [[(100, 20, 30)]]), rows(333, [[(33, 7, 11), (100, 20, 30), (2, 3)]])
    arrays = heads(alone, dtype)
    moved = [jnp.pad(x, ((0, 0), (51, 82), (0, 0), (0, 0)), constant_values=0.5) for x in arrays]
    once = value_and_gradients("blocked", alone, None, *arrays)
    again = value_and_gradients("blocked", later, None, *moved)
    for one, other in zip(once, again, strict=True):
        np.testing.assert_array_equal(one[:, :150], other[:, 51:201])


def test_config_names_every_implementation() -> None:
    named = get_args(ModelConfig.__annotations__["attention"])
    assert set(named) == {"auto", *get_args(Implementation)} == {"auto", *IMPLEMENTATIONS}


def test_each_platform_gets_its_own() -> None:
    assert [choose(platform, "bfloat16", 128) for platform in ("cpu", "gpu", "tpu")] == ["blocked", "cudnn", "splash"]
    assert [choose("gpu", "float32", 128), choose("gpu", "bfloat16", 100)] == ["blocked", "blocked"]
    for platform in ("cpu", "gpu", "tpu"):
        for dtype, size in (("float32", 64), ("bfloat16", 64), ("bfloat16", 256)):
            assert why_not(choose(platform, dtype, size), platform, dtype, size) is None
            assert why_not("dense", platform, dtype, size) is None
    assert why_not("splash", "gpu", "bfloat16", 64) == "it runs on a tpu only, and the devices are of platform gpu"
    assert "not float32 and heads of 64" in str(why_not("cudnn", "gpu", "float32", 64))


def test_cudnn_gets_its_kernels_for_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowered for a GPU without one; a length that is odd and a window."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    context = LAYOUTS["many"]
    q, k, v, d = heads(context, jnp.bfloat16)

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pull = jax.vjp(lambda q, k, v: cudnn.attention(q, k, v, context, 3, None), q, k, v)
        assert out.shape == q.shape
        return pull(d)

    program = jax.jit(both).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@__cudnn$fmhaScaleBiasSoftmax(") == 1
    assert program.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert "while" not in program
