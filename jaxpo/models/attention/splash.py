"""Attention on a TPU: the splash kernel of JAX, which leaves out the tiles of a row that no token sees.

It takes what a token may see as a mask [T, T], one for all heads, of which it computes the tiles that hold anything;
the scores never leave the chip. Dao 2023 (arXiv 2307.08691), in Pallas.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from jaxpo.models.attention.context import Context, filled, visible

# Heads are filled up to the width of a TPU's vector registers, rows to whole tiles.
LANES = 128
TILES = (512, 256, 128)


def attention(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    context: Context,
    window: int | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """See `packed_attention`. `interpret` runs the kernel as plain JAX, on any device, to test it."""
    T, H = q_RTNH.shape[1], q_RTNH.shape[3]
    T_filled = -(-T // LANES) * LANES

    def heads_first(x: jax.Array) -> jax.Array:
        wide = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, -H % LANES)])
        return filled(wide, T_filled - T).swapaxes(1, 2)

    # The mask is made again for the backward pass: kept for each layer, it would take more than the activations.
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attention"))
    def of_row(row: tuple[jax.Array, jax.Array, jax.Array, Context]) -> jax.Array:
        q_NTH, k_KTH, v_KTH, here = row
        places_T = jnp.arange(T_filled)
        mask_1TT = visible(here, places_T, here, places_T, window)[None]
        kernel = splash.make_splash_mha(
            mask_1TT,
            block_sizes=block_sizes(T_filled),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
        out: Any = known_to_be_dynamic(kernel)(q_NTH, k_KTH, v_KTH)
        return out

    # A place that fills a row up is padding, and a segment of its own.
    context = Context(*(filled(field, T_filled - T) for field in context))
    # The kernel does not scale scores.
    q_RNTH = heads_first((q_RTNH.astype(jnp.float32) * H**-0.5).astype(q_RTNH.dtype))
    out_RNTH = lax.map(of_row, (q_RNTH, heads_first(k_RTKH), heads_first(v_RTKH), context))
    return out_RNTH.swapaxes(1, 2)[:, :T, :, :H]


def known_to_be_dynamic(kernel: splash.SplashAttentionKernel) -> splash.SplashAttentionKernel:
    """The kernel with a flag of its masks as a constant: made while JAX traces, it is an array no `if` can read."""
    masks: list[Any] = [kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info]
    return splash.SplashAttentionKernel(*(mask._replace(is_dynamic_mask=True) for mask in masks), **kernel.kwargs)


def block_sizes(T: int) -> splash.BlockSizes:
    """The largest tiles that divide a row of T tokens."""
    tile = next(tile for tile in TILES if T % tile == 0)
    return splash.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )
