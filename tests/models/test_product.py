"""Products with weights, and what is computed again in the backward pass, against float64 and plain autodiff."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.models.kept import keep, named_anywhere, recomputed, restore
from jaxpo.models.product import linears, turned


def linear(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    return linears(x, [kernel], axes)[0]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("x", "kernel", "axes", "letters"),
    [
        (normal(0, 2, 7, 12), normal(1, 12, 20), 1, "rtd,df->rtf"),
        (normal(0, 2, 7, 12), normal(1, 12, 3, 8), 1, "rtd,dnh->rtnh"),
        (normal(0, 2, 7, 3, 8), normal(1, 3, 8, 12), 2, "rtnh,nhd->rtd"),
        (normal(0, 5, 12), normal(1, 12, 20), 1, "td,df->tf"),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 6e-3)])
def test_linear_against_float64(
    x: np.ndarray, kernel: np.ndarray, axes: int, letters: str, dtype: str, tolerance: float
) -> None:
    inputs, outputs = letters.split("->")
    left, right = inputs.split(",")
    rounded = [np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, kernel)]
    value, of_value = jax.vjp(lambda x, k: linear(x, k, axes), jnp.asarray(x, dtype), jnp.asarray(kernel))
    slope = jnp.asarray(normal(2, *value.shape), dtype)
    d_x, d_kernel = of_value(slope)
    exact_slope = np.asarray(slope, np.float64)
    pairs = [
        (value, np.einsum(letters, *rounded)),
        (d_x, np.einsum(f"{outputs},{right}->{left}", exact_slope, rounded[1])),
        (d_kernel, np.einsum(f"{left},{outputs}->{right}", rounded[0], exact_slope)),
    ]
    for got, exact in pairs:
        assert np.linalg.norm(np.asarray(got, np.float64) - exact) <= tolerance * np.linalg.norm(exact)
    # The weights' own precision: what is rounded is the activations, not the sums.
    assert (value.dtype, d_x.dtype, d_kernel.dtype) == (jnp.dtype(dtype), jnp.dtype(dtype), jnp.float32)
    assert np.linalg.norm(np.asarray(d_kernel, np.float64) - pairs[2][1]) <= 1e-6 * np.linalg.norm(pairs[2][1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linears_are_each_a_linear_and_keep_their_input_once(dtype: str) -> None:
    x, kernels = jnp.asarray(normal(0, 2, 7, 12), dtype), [jnp.asarray(normal(n, 12, 3 + n, 4)) for n in (1, 2, 3)]
    slopes = [jnp.asarray(normal(n, 2, 7, 3 + n, 4), dtype) for n in (1, 2, 3)]
    values, of_values = jax.vjp(lambda x, k: linears(x, k, 1), x, kernels)
    found_x, found_kernels = of_values(slopes)
    each = [jax.vjp(lambda x, k: linear(x, k, 1), x, kernel) for kernel in kernels]
    parts = [of_value(slope) for (_, of_value), slope in zip(each, slopes, strict=True)]
    for found, (wanted, _) in zip(values, each, strict=True):
        np.testing.assert_array_equal(found, wanted)
    for found, (_, wanted) in zip(found_kernels, parts, strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(found_x, parts[0][0] + parts[1][0] + parts[2][0])
    kept = [leaf for leaf in jax.tree.leaves(of_values) if np.size(leaf) == x.size]
    assert len(kept) == 1


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_recomputed_has_the_same_gradient(dtype: str) -> None:
    gate, up = jnp.asarray(normal(0, 3, 50), dtype), jnp.asarray(normal(1, 3, 50), dtype)

    def gradients(function: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
        return jax.jit(jax.grad(lambda g, u: function(g, u).astype(jnp.float32).sum(), (0, 1)))(gate, up)

    for got, expected in zip(gradients(recomputed(gated)), gradients(gated), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=1e-2, atol=1e-6)


def test_only_the_arguments_are_kept() -> None:
    x = jnp.asarray(normal(0, 64, 64), "bfloat16")
    _, of_plain = jax.vjp(lambda x: jnp.tanh(jnp.exp(x) * jnp.sin(x)), x)
    _, of_recomputed = jax.vjp(recomputed(lambda x: jnp.tanh(jnp.exp(x) * jnp.sin(x))), x)

    def kept_bytes(of: object) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(of))

    assert kept_bytes(of_recomputed) == x.nbytes < kept_bytes(of_plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_and_restored_to_the_bit(dtype: str) -> None:
    x = jnp.asarray([0.0, -0.0, 1.5, -3.25e-3, np.inf, -np.inf, 3e38, 1e-40], dtype)
    again = restore(keep(x))
    assert again.dtype == x.dtype
    assert np.asarray(again).tobytes() == np.asarray(x).tobytes()
    # On the CPU, where the suite runs, bfloat16 is kept as integers: no loop over layers converts all that it stacks.
    assert keep(x).dtype == (jnp.uint16 if dtype == "bfloat16" else jnp.float32)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_turned_is_the_transpose(dtype: type) -> None:
    """Whatever stands in the first place, from which the start of a slice is made."""
    for first in (0, 1, np.iinfo(dtype).max):
        x = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 9), dtype=dtype)
        x[0, 0] = first
        np.testing.assert_array_equal(jax.jit(turned)(jnp.asarray(x)), x.T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_name_passes_values_and_gradients_on(dtype: str) -> None:
    x = jnp.asarray(normal(0, 4, 6), dtype)
    value, slope = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(named_anywhere(x, "name"))))(x)
    assert value == jnp.sum(jnp.sin(x))
    np.testing.assert_array_equal(slope, jnp.cos(x))
