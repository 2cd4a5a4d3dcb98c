"""From a decoder and packed rows to the log-prob sum of every completion.

This is the one forward pass that training, evaluation and the reference table share.

Legend: R rows, T tokens, S scored tokens, X example slots, K completions, D hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpo.batch import DeviceBatch
from jaxpo.models.attention import packed_attention
from jaxpo.models.decoder import Decoder, Remat
from jaxpo.objectives.logprobs import token_scores


class Scores(NamedTuple):
    """logps [R, X, K]: log-prob sums in nats, 0 in an empty slot; correct [R, X, K]: tokens that were the likeliest."""

    logps: jax.Array
    correct: jax.Array


def as_it_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Scorer:
    """The numerics of a forward pass.

    compute_dtype: of matrix products. remat: see `ModelConfig`. chunk: scored tokens of a row that meet the head at
    once. constrain: keeps [R, ...] activations sharded over the mesh's batch axes. gather: brings together
    first what the forward pass needs whole.
    """

    compute_dtype: str
    remat: Remat
    chunk: int
    constrain: Callable[[jax.Array], jax.Array] = as_it_is
    gather: Callable[[Decoder], Decoder] = as_it_is

    def __call__(self, decoder: Decoder, batch: DeviceBatch) -> Scores:
        """Score one microbatch: the fields of `batch` without their M axis."""

        decoder = self.gather(decoder)
        R, X, K = batch.lengths.shape

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k, v = map(self.constrain, (q, k, v))
            out = packed_attention(q, k, v, batch.segments, batch.branches, batch.positions, decoder.config.window)
            return self.constrain(out)

        hidden_RTD, _ = decoder.hidden(
            batch.tokens, batch.positions, attend, compute_dtype=jnp.dtype(self.compute_dtype), remat=self.remat
        )
        # A last, shorter chunk is filled up with targets that belong to no completion.
        rest = ((0, 0), (0, -batch.target_slots.shape[1] % self.chunk))
        positions_RS, labels_RS = jnp.pad(batch.target_positions, rest), jnp.pad(batch.target_labels, rest)
        slots_RS = jnp.pad(batch.target_slots, rest, constant_values=X * K)
        hidden_RSD = jnp.take_along_axis(self.constrain(hidden_RTD), positions_RS[..., None], axis=1)
        used = batch.lengths.sum(axis=(1, 2)).max()
        head_VD = decoder.head_matrix().astype(hidden_RTD.dtype)
        scores = token_scores(self.constrain(hidden_RSD), head_VD, labels_RS, used, self.chunk)
        return Scores(*(self.constrain(sum_by_slot(s, slots_RS, (R, X, K))) for s in scores))


def microbatch(batch: DeviceBatch, i: jax.Array) -> DeviceBatch:
    """Microbatch i of a batch: fields [M, R, ...] become [R, ...], the batch's totals stay."""
    return DeviceBatch(*(lax.dynamic_index_in_dim(f, i, keepdims=False) if jnp.ndim(f) > 1 else f for f in batch))


def sum_by_slot(values_RS: jax.Array, slots_RS: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Sum values [R, S] into their slots [R, X, K]; a slot of X * K is none. No scatter: sums have one fixed order."""
    R, X, K = shape
    member_RSN = slots_RS[..., None] == jnp.arange(X * K)
    return jnp.where(member_RSN, values_RS[..., None], 0.0).sum(axis=1).reshape(R, X, K)


def head_chunk(row_length: int, rows_per_device: int) -> int:
    """Columns of a row to take to the head at once: at most about 1,024 tokens on a device, in chunks of one size."""
    most = max(1, min(row_length, 1024 // rows_per_device))
    return math.ceil(row_length / math.ceil(row_length / most))
