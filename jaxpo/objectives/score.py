"""From a decoder and packed rows to what an objective wants to know of every completion.

This is the one forward pass that training, evaluation and the reference table share.

Legend: R rows, T tokens, S scored tokens, X example slots, K completions, B = 1 + K branches, D hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxpo.batch import Carry, Completions, DeviceBatch, Statistic
from jaxpo.models.attention import Attention, Context, Implementation, packed_attention
from jaxpo.models.decoder import Decoder, DecoderConfig, Remat
from jaxpo.models.product import Parts
from jaxpo.objectives.logprobs import Blocks, token_scores

# Slots whose sums are taken together.
SLOTS_AT_ONCE = 128


class Scores(NamedTuple):
    """Sums over a branch's scored tokens, float32 [R, X, B], 0 in an empty slot and where not asked for.

    logps: log-probs in nats. correct: tokens that were the likeliest. shared: log-probs of as many tokens as the
    example's shortest completion has. confidence: see `token_scores`. rewards [R, X, K]: of the completions.
    """

    logps: jax.Array
    correct: jax.Array
    shared: jax.Array
    confidence: jax.Array
    rewards: jax.Array


Score = Callable[[Decoder, DeviceBatch], Scores]


class Devices(Protocol):
    """How a forward pass is spread over devices, see `training.mesh.Layout`."""

    @property
    def number(self) -> int: ...
    def over_rows(self, score: Score) -> Score: ...
    def whole(self, decoder: Decoder) -> Decoder: ...
    def parts(self, config: DecoderConfig) -> Parts | None: ...
    def rows(self, context: Context) -> Context: ...
    def spread(self, attention: Attention) -> Attention: ...
    def summed(self, scores: Scores) -> Scores: ...


@dataclass(frozen=True)
class OneDevice:
    """One device, which has everything."""

    @property
    def number(self) -> int:
        return 1

    def over_rows(self, score: Score) -> Score:
        return score

    def whole(self, decoder: Decoder) -> Decoder:
        return decoder

    def parts(self, config: DecoderConfig) -> Parts | None:
        return None

    def rows(self, context: Context) -> Context:
        return context

    def spread(self, attention: Attention) -> Attention:
        return attention

    def summed(self, scores: Scores) -> Scores:
        return scores


@dataclass(frozen=True)
class Scorer:
    """The numerics of a forward pass.

    compute_dtype: of matrix products. remat, unroll: see `ModelConfig`. blocks: what meets the head at once.
    statistics: what to compute besides log-prob sums. attention: which implementation of it. devices: how it all is
    spread over them.
    """

    compute_dtype: str
    remat: Remat
    blocks: Blocks
    statistics: frozenset[Statistic] = frozenset()
    attention: Implementation = "dense"
    unroll: int = 1
    devices: Devices = OneDevice()

    def __call__(self, decoder: Decoder, batch: DeviceBatch) -> Scores:
        """Score one microbatch: the fields of `batch` without their M axis."""
        return self.devices.over_rows(self._on_each)(decoder, batch)

    def _on_each(self, decoder: Decoder, batch: DeviceBatch) -> Scores:
        """Of a device's own tokens, with its own parts of the weights."""
        decoder = self.devices.whole(decoder)
        R, X, B = batch.lengths.shape

        context = self.devices.rows(Context(batch.segments, batch.branches, batch.positions))
        attention = self.devices.spread(partial(packed_attention, implementation=self.attention))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, context, decoder.config.window, None)

        hidden_RTD, _ = decoder.hidden(
            batch.tokens,
            batch.positions,
            attend,
            compute_dtype=jnp.dtype(self.compute_dtype),
            remat=self.remat,
            unroll=self.unroll,
            parts=self.devices.parts(decoder.config),
        )
        nothing_RXB = jnp.zeros((R, X, B), jnp.float32)
        if "rewards" in self.statistics:
            ends_RN = jnp.reshape(batch.ends, (R, X * (B - 1)))
            ends_RND = jnp.take_along_axis(hidden_RTD, ends_RN[..., None], axis=1)
            rewards_RXK = decoder.rewards(ends_RND).reshape(R, X, B - 1)
            rewards_RXK = jnp.where((batch.lengths[..., 1:] > 0) & (batch.ends >= 0), rewards_RXK, 0.0)
            return self.devices.summed(Scores(nothing_RXB, nothing_RXB, nothing_RXB, nothing_RXB, rewards_RXK))

        # A last, shorter block is filled up with targets that belong to no completion.
        rest = ((0, 0), (0, -batch.target_slots.shape[1] % self.blocks.tokens[-1]))
        positions_RS, labels_RS = jnp.pad(batch.target_positions, rest), jnp.pad(batch.target_labels, rest)
        slots_RS = jnp.pad(batch.target_slots, rest, constant_values=X * B)
        hidden_RSD = jnp.take_along_axis(hidden_RTD, positions_RS[..., None], axis=1)
        used = (slots_RS < X * B).sum(axis=1).max()
        confidence = "confidence" in self.statistics
        head_VD = decoder.head_matrix()
        scores = token_scores(hidden_RSD, head_VD, labels_RS, used, self.blocks, confidence)

        def by_branch(values_RS: jax.Array) -> jax.Array:
            return sum_by_slot(values_RS, slots_RS, (R, X, B))

        shared_RXB = nothing_RXB
        if "shared" in self.statistics:
            indices_RS = jnp.pad(batch.target_indices, rest)
            within_RS = within_shortest(jnp.asarray(batch.lengths), slots_RS, indices_RS)
            shared_RXB = by_branch(jnp.where(within_RS, scores.logps, 0.0))
        return self.devices.summed(
            Scores(
                logps=by_branch(scores.logps),
                correct=by_branch(scores.correct),
                shared=shared_RXB,
                confidence=nothing_RXB if scores.confidence is None else by_branch(scores.confidence),
                rewards=nothing_RXB[..., 1:],
            )
        )


def completions_of(scores: Scores, batch: DeviceBatch, carry: Carry) -> Completions:
    """What an objective sees of a microbatch (fields [R, X, ...]) or of a whole batch ([M, R, X, ...])."""

    def flat(array: Any, inner: int) -> jax.Array:
        """[..., X, *inner axes] as [E, *inner axes]."""
        array = jnp.asarray(array)
        return array.reshape(-1, *array.shape[array.ndim - inner :])

    lengths_EB, logps_EB, references_EQK = flat(batch.lengths, 1), flat(scores.logps, 1), flat(batch.references, 2)
    return Completions(
        logps=logps_EB[:, 1:],
        reference_logps=references_EQK[:, 0],
        lengths=lengths_EB[:, 1:],
        correct=flat(scores.correct, 1)[:, 1:],
        present=lengths_EB[:, 1] > 0,
        weight=jnp.ones(len(lengths_EB), jnp.float32),
        label=flat(batch.labels, 0),
        scores=flat(batch.scores, 1),
        num_examples=jnp.asarray(batch.num_examples, jnp.float32),
        num_tokens=jnp.asarray(batch.num_tokens, jnp.float32),
        carry=carry,
        shared_logps=flat(scores.shared, 1)[:, 1:],
        shared_reference_logps=references_EQK[:, -1],
        confidence=lax.stop_gradient(flat(scores.confidence, 1)[:, 1:]),
        prompt_logps=logps_EB[:, 0],
        prompt_lengths=lengths_EB[:, 0],
        rewards=flat(scores.rewards, 1),
    )


def microbatch(batch: DeviceBatch, i: jax.Array) -> DeviceBatch:
    """Microbatch i of a batch: fields [M, R, ...] become [R, ...], the batch's totals stay."""
    return DeviceBatch(*(lax.dynamic_index_in_dim(f, i, keepdims=False) if jnp.ndim(f) > 1 else f for f in batch))


def all_scores(scorer: Scorer, decoder: Decoder, batch: DeviceBatch) -> Scores:
    """The scores of a whole batch, fields [M, R, X, ...], a microbatch at a time."""

    def one(i: jax.Array) -> Scores:
        return scorer(decoder, microbatch(batch, i))

    def body(i: jax.Array, so_far: Scores) -> Scores:
        return jax.tree.map(lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, i, 0), so_far, one(i))

    M = batch.lengths.shape[0]
    zero = jax.tree.map(lambda s: jnp.zeros((M, *s.shape), s.dtype), jax.eval_shape(one, jnp.int32(0)))
    return lax.fori_loop(0, batch.num_microbatches, body, zero)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_by_slot(values_RS: jax.Array, slots_RS: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Sum values [R, S] into their slots [R, X, B]; a slot of X * B is none. No scatter: sums have one fixed order."""
    R, X, B = shape
    # Some slots at a time: S times all of them would outgrow everything else in a long row.
    at_once = min(X * B, SLOTS_AT_ONCE)

    def of_slots(first: jax.Array) -> jax.Array:
        member_RSN = slots_RS[..., None] == first + jnp.arange(at_once)
        return jnp.where(member_RSN, values_RS[..., None], 0.0).sum(axis=1)

    sums_RN = jnp.concatenate(list(lax.map(of_slots, jnp.arange(0, X * B, at_once))), axis=1)
    return sums_RN[:, : X * B].reshape(R, X, B)


def _sum_by_slot_forward(
    values_RS: jax.Array, slots_RS: jax.Array, shape: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    return sum_by_slot(values_RS, slots_RS, shape), slots_RS


def _sum_by_slot_backward(
    shape: tuple[int, int, int], slots_RS: jax.Array, d_sums_RXB: jax.Array
) -> tuple[jax.Array, None]:
    d_sums_RN = jnp.pad(d_sums_RXB.reshape(len(d_sums_RXB), -1), ((0, 0), (0, 1)))
    return jnp.take_along_axis(d_sums_RN, slots_RS, axis=1), None


sum_by_slot.defvjp(_sum_by_slot_forward, _sum_by_slot_backward)


def within_shortest(lengths_RXB: jax.Array, slots_RS: jax.Array, indices_RS: jax.Array) -> jax.Array:
    """Whether a target [R, S] is among the first n of its completion, n being the example's shortest completion."""
    shortest_RN = jnp.repeat(lengths_RXB[..., 1:].min(axis=-1), lengths_RXB.shape[-1], axis=1)
    return indices_RS < jnp.take_along_axis(jnp.pad(shortest_RN, ((0, 0), (0, 1))), slots_RS, axis=1)


def head_blocks(row_length: int, rows_per_device: int, platform: str, devices: int) -> Blocks:
    """What meets the head at once, of rows of which a device has row_length tokens.

    On an accelerator a sixteenth of a device's tokens, so that little of the last block is computed for nothing, but
    between 128 and 1,024: fewer keep no device busy, more take memory and gain nothing; in blocks of one size. On a CPU
    1,024 tokens and 4,096 words, whose logits are 16 MB, and 128 tokens of what is left. Over several devices the
    words are all of them, for a device may hold a part of the vocabulary.
    """
    if platform == "cpu":
        least = min(row_length, max(1, 128 // rows_per_device))
        return Blocks((8 * least, least) if 8 * least <= row_length else (least,), 4096 if devices == 1 else None)
    most = max(1, min(row_length, min(max(row_length * rows_per_device // 16, 128), 1024) // rows_per_device))
    return Blocks((math.ceil(row_length / math.ceil(row_length / most)),))
