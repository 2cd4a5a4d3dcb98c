"""The one function through which every forward pass attends, and which implementation of it a platform gets."""

from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from jaxpo.models.attention import blocked, cudnn, dense, splash
from jaxpo.models.attention.context import Context, places_of

Implementation = Literal["dense", "blocked", "splash", "cudnn"]


class Attention(Protocol):
    def __call__(
        self,
        q_RQNH: jax.Array,
        k_RTKH: jax.Array,
        v_RTKH: jax.Array,
        context: Context,
        window: int | None,
        pieces: jax.Array | None,
        /,
    ) -> jax.Array: ...


IMPLEMENTATIONS: dict[Implementation, Attention] = {
    "dense": dense.attention,
    "blocked": blocked.attention,
    "splash": splash.attention,
    "cudnn": cudnn.attention,
}
# The platform that an implementation runs on; the others run anywhere.
PLATFORMS: dict[Implementation, str] = {"splash": "tpu", "cudnn": "gpu"}


def choose(platform: str, compute_dtype: str, head_dim: int) -> Implementation:
    """The fastest implementation on a platform."""
    if platform == "tpu":
        return "splash"
    return "cudnn" if platform == "gpu" and cudnn.supports(compute_dtype, head_dim) else "blocked"


def why_not(implementation: Implementation, platform: str, compute_dtype: str, head_dim: int) -> str | None:
    """Why an implementation cannot run there; None if it can."""
    if (its_own := PLATFORMS.get(implementation, platform)) != platform:
        return f"it runs on a {its_own} only, and the devices are of platform {platform}"
    if implementation == "cudnn" and not cudnn.supports(compute_dtype, head_dim):
        return f"it takes bfloat16 and heads of a multiple of 8 up to 128, not {compute_dtype} and heads of {head_dim}"
    return None


def packed_attention(
    q_RQNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    context: Context,
    window: int | None = None,
    pieces: jax.Array | None = None,
    implementation: Implementation = "dense",
) -> jax.Array:
    """Softmax attention [R, Q, N, H] of rotated queries and keys: what `context.visible` lets a token see.

    Queries are those of the whole row, Q = T, or of `pieces` [P] of it, the places where they begin, all of one length.

    N is a multiple of K, the heads of keys and values. The softmax is float32; probabilities enter their product with
    the values in the inputs' precision. A place of padding (segment 0) puts out 0 and passes no gradient on.
    """
    out_RQNH = IMPLEMENTATIONS[implementation](q_RQNH, k_RTKH, v_RTKH, context, window, pieces)
    segments_RQ = context.segments[:, places_of(pieces, q_RQNH.shape[1])]
    return jnp.where((segments_RQ > 0)[:, :, None, None], out_RQNH, 0)
