"""Greedy answers with a cache of keys and values: one compiled program for a batch of prompts.

Shape legend: B prompts, P tokens of the longest prompt (padded), S places of the cache, N query heads, K key and value
heads, H head size, V vocabulary, L layers.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo import processes
from jaxpo.errors import UserError
from jaxpo.models.decoder import CachedAttend, Decoder, Learned

# Prompts are padded to a multiple of this, so that batches of like lengths share a program.
PROMPT_BUCKET = 64


class Cache(NamedTuple):
    """Keys and values [L, B, S, K, H] of the places written so far; a place is a position."""

    keys: jax.Array
    values: jax.Array


def greedy(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    eos_ids: Collection[int],
    compute_dtype: Any = jnp.float32,
) -> list[np.ndarray]:
    """The likeliest next tokens after each prompt [P_b], one by one: int32 arrays [<= max_new_tokens].

    An answer ends with the first of `eos_ids`, which it includes. A prompt has at least one token.
    """
    if not prompts:
        return []
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths_B.max())
    positions = decoder.config.positions
    if isinstance(positions, Learned) and longest + max_new_tokens > positions.max_positions:
        raise UserError(
            f"found a prompt of {longest} tokens and samples.max_new_tokens = {max_new_tokens}; the model has "
            f"{positions.max_positions} positions."
        )
    tokens_BP = np.zeros((len(prompts), -(-longest // PROMPT_BUCKET) * PROMPT_BUCKET), np.int32)
    for row, prompt in zip(tokens_BP, prompts, strict=True):
        row[: len(prompt)] = prompt
    eos = np.array(sorted(eos_ids), np.int32)
    new, counts = map(processes.whole, _generate(decoder, tokens_BP, lengths_B, eos, max_new_tokens, compute_dtype))
    return [row[:count] for row, count in zip(new, counts, strict=True)]


@partial(jax.jit, static_argnums=(4, 5))
def _generate(
    decoder: Decoder, tokens_BP: jax.Array, lengths_B: jax.Array, eos: jax.Array, max_new: int, compute_dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """New tokens [B, max_new] and how many of them count [B]."""
    config = decoder.config
    B, P = tokens_BP.shape
    empty = jnp.zeros((config.num_layers, B, P + max_new, config.num_kv_heads, config.head_dim), compute_dtype)

    def forward(tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        attend = cached_attention(positions, config.window)
        return decoder.hidden_with_cache(tokens, positions, attend, cache, compute_dtype=compute_dtype)

    hidden_BPD, cache = forward(tokens_BP, jnp.broadcast_to(jnp.arange(P), (B, P)), Cache(empty, empty))
    last_BD = jnp.take_along_axis(hidden_BPD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    first_B = jnp.argmax(decoder.logits(last_BD), -1).astype(jnp.int32)

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        step, _, _, _, done_B, _ = state
        return (step < max_new) & ~jnp.all(done_B)

    def step_on(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, next_B, new, counts_B, done_B, cache = state
        new = new.at[:, step].set(jnp.where(done_B, 0, next_B))
        counts_B = counts_B + ~done_B
        done_B = done_B | jnp.isin(next_B, eos)
        hidden_B1D, cache = forward(next_B[:, None], (lengths_B + step)[:, None], cache)
        next_B = jnp.argmax(decoder.logits(hidden_B1D[:, 0]), -1).astype(jnp.int32)
        return step + 1, next_B, new, counts_B, done_B, cache

    new, counts_B, done_B = jnp.zeros((B, max_new), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
    state = jax.lax.while_loop(unfinished, step_on, (jnp.int32(0), first_B, new, counts_B, done_B, cache))
    return state[2], state[3]


def cached_attention(positions_BT: jax.Array, window: int | None) -> CachedAttend:
    """Attention of tokens at `positions_BT` that writes their keys and values at those places of the cache.

    A query reads the places up to its own, which hold this row's tokens: what padding wrote lies behind, and is
    overwritten before it is reached.
    """

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        rows_B1 = jnp.arange(q_BTNH.shape[0])[:, None]
        keys_BSKH = cache.keys.at[rows_B1, positions_BT].set(k_BTKH)
        values_BSKH = cache.values.at[rows_B1, positions_BT].set(v_BTKH)
        places_S = jnp.arange(keys_BSKH.shape[1])
        seen_BTS = places_S <= positions_BT[:, :, None]
        if window is not None:
            seen_BTS &= positions_BT[:, :, None] - places_S < window
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH, keys_BSKH, values_BSKH, mask=seen_BTS[:, None], implementation="xla"
        )
        return out_BTNH, Cache(keys_BSKH, values_BSKH)

    return attend
