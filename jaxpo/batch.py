"""The vocabulary every room shares: an example, a packed batch, what an objective sees, a metric.

Shape legend: M microbatches, R rows in a microbatch, T tokens in a row, S scored tokens in a row, X example slots in a
row, K completions of an example, E = R * X example slots of a microbatch.
"""

from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np

A = TypeVar("A", jax.Array, np.ndarray)


@dataclass(frozen=True)
class Example:
    """A prompt with K completions, as token ids: SFT has K = 1, a preference pair K = 2 with the chosen one first.

    `prompt` [P] and each of `completions` [C_k] are int32; P >= 1 and every C_k >= 1. `id` says where the example came
    from (`path:line` or `path:row`), for messages to people.
    """

    id: str
    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]


class Metric(NamedTuple):
    """A mean in the making: sums and weights add over microbatches, devices and batches; the mean is sum / weight."""

    sum: jax.Array
    weight: jax.Array


class Completions(NamedTuple):
    """The completions of a microbatch as an objective sees them: small float32 arrays, no tokens.

    logps, reference_logps [E, K]: log-probs of a completion's tokens given its prompt, summed, in nats (0 in an empty
    slot; reference_logps is 0 where the objective uses no reference). lengths [E, K]: completion tokens.
    correct [E, K]: completion tokens that were the likeliest of the vocabulary. present [E]: whether the slot holds an
    example.
    num_examples, num_tokens []: examples and completion tokens of the *whole* batch, the denominators of a mean.
    """

    logps: jax.Array
    reference_logps: jax.Array
    lengths: jax.Array
    correct: jax.Array
    present: jax.Array
    num_examples: jax.Array
    num_tokens: jax.Array


class Objective(Protocol):
    """A frozen dataclass of hyper-parameters that turns completions into a loss.

    The returned loss is the microbatch's *share* of the batch's loss: shares, and their gradients, add up to it.
    """

    num_completions: ClassVar[int]
    uses_reference: ClassVar[bool]

    def __call__(self, completions: Completions, /) -> tuple[jax.Array, dict[str, Metric]]: ...


class PackedBatch(NamedTuple, Generic[A]):
    """Examples packed into rows, on the host (`HostBatch`) or the devices (`DeviceBatch`).

    All int32 but reference_logps; unused places hold 0.

    tokens, positions [M, R, T]: positions restart after the prompt for every completion.
    segments [M, R, T]: which context a token belongs to, from 1 in each row; 0 is padding.
    branches [M, R, T]: 0 for a prompt's token, k for one of completion k (from 1). A token attends to earlier tokens of
        its own segment that are of the prompt or of its own branch.
    target_positions, target_labels [M, R, S]: the hidden state at a position predicts a label, a completion token.
    target_slots [M, R, S]: the completion a target belongs to, x * K + k; X * K where there is no target.
    lengths, reference_logps [M, R, X, K]: completion tokens (0 in an empty slot) and the reference's log-prob sums.
    num_microbatches []: microbatches that hold rows; the rest of M is there to keep shapes few.
    num_examples, num_tokens []: examples and completion tokens of the whole batch.
    """

    tokens: A
    positions: A
    segments: A
    branches: A
    target_positions: A
    target_labels: A
    target_slots: A
    lengths: A
    reference_logps: A
    num_microbatches: A
    num_examples: A
    num_tokens: A


HostBatch = PackedBatch[np.ndarray]
DeviceBatch = PackedBatch[jax.Array]
