"""The one function through which every forward pass attends, and which implementation of it a platform gets."""

from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from jaxpo.models.attention import blocked, dense
from jaxpo.models.attention.context import Context

Implementation = Literal["dense", "blocked"]


class Attention(Protocol):
    def __call__(
        self, q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array, context: Context, window: int | None, /
    ) -> jax.Array: ...


IMPLEMENTATIONS: dict[Implementation, Attention] = {"dense": dense.attention, "blocked": blocked.attention}


def choose(platform: str) -> Implementation:
    """The fastest implementation on a platform."""
    return "blocked"


def packed_attention(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    context: Context,
    window: int | None = None,
    implementation: Implementation = "dense",
) -> jax.Array:
    """Softmax attention [R, T, N, H] of rotated queries and keys: what `context.visible` lets a token see.

    N is a multiple of K, the heads of keys and values. Scores and probabilities are float32. A place of padding
    (segment 0) puts out 0 and passes no gradient on.
    """
    out_RTNH = IMPLEMENTATIONS[implementation](q_RTNH, k_RTKH, v_RTKH, context, window)
    return jnp.where((context.segments > 0)[:, :, None, None], out_RTNH, 0)
