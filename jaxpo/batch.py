"""The vocabulary every room shares: an example, a packed batch, what an objective sees, a metric.

Shape legend: M microbatches, R rows in a microbatch, T tokens in a row, S scored tokens in a row, X example slots in a
row, K completions of an example, B = 1 + K branches of an example (0 its prompt, k completion k), Q statistics of the
reference, E example slots of what an objective sees: R * X of a microbatch, M * R * X of a whole batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

A = TypeVar("A", jax.Array, np.ndarray)

# What a row of data says: one good answer; two answers, the better one first; an answer and whether it is desirable;
# answers in order, the best one first.
Feedback = Literal["completion", "pair", "label", "ranking"]

# What an objective can ask of the policy besides the log-prob sums of completions, see `Completions`.
Statistic = Literal["shared", "confidence", "prompt", "rewards"]


@dataclass(frozen=True)
class Example:
    """A prompt with K completions, as token ids: SFT has K = 1, a preference pair K = 2 with the chosen one first.

    `prompt` [P] and each of `completions` [C_k] are int32; P >= 1. A list with fewer than K answers ends in completions
    of no tokens; C_0 >= 1. `id` says where the example came from (`path:line` or `path:row`), for messages to people.
    label: the probability that the row's judgement is right: that completion 0 is better than completion 1, or that the
    one completion is desirable. scores [K] float32: a rating of each completion, zeros where the data has none.
    """

    id: str
    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    label: float = 1.0
    scores: np.ndarray | None = None


class Metric(NamedTuple):
    """A mean in the making: sums and weights add over microbatches, devices and batches; the mean is sum / weight."""

    sum: jax.Array
    weight: jax.Array


Metrics = dict[str, Metric]
Carry = Mapping[str, jax.Array]

# What a metric is to become.
Mode = Literal["min", "max"]
# The names of metrics that are better the less, or the more, there is. Of rewards/chosen, logps/rejected, kl/chosen and
# the like, which may go either way, that cannot be said.
_LESS = ("loss", "*_loss", "*/loss", "loss/*", "kl", "kl/abs", "calibration_error")
_MORE = ("accuracy", "*_accuracy", "*/accuracies", "*/top1", "margin", "*/margins", "log_odds_*")


def direction(metric: str, mode: Mode | None = None) -> int:
    """1 where more of a metric is better, -1 where less is, 0 where that cannot be said.

    A mode says it; without one the metric's name does, be it of a training step or of an evaluation (`eval_`).
    """
    if mode is not None:
        return 1 if mode == "max" else -1
    name = metric.removeprefix("eval_")
    more, less = (any(fnmatchcase(name, pattern) for pattern in patterns) for patterns in (_MORE, _LESS))
    return more - less


class Completions(NamedTuple):
    """The completions of a microbatch as an objective sees them: small float32 arrays, no tokens.

    logps, reference_logps [E, K]: log-probs of a completion's tokens given its prompt, summed, in nats (0 in an empty
    slot; reference_logps is 0 where the objective uses no reference). lengths [E, K]: completion tokens.
    correct [E, K]: completion tokens that were the likeliest of the vocabulary. present [E]: whether the slot holds an
    example; weight [E]: how much that one counts in a mean. label [E], scores [E, K]: as in `Example`.
    num_examples []: examples of the *whole* batch; num_tokens [B]: its scored tokens, by branch: the denominators of a
    mean. carry: scalars that the objective hands on from step to step, and `beta_scale` [], a factor of every beta.

    Of the rest an objective gets what its `statistics` name:
    `shared`: shared_logps, shared_reference_logps [E, K], the sums over the first min(lengths) tokens only.
    `confidence`: confidence [E, K], sums over tokens of log p(label) - log sum_v p(v)^2, without a gradient.
    `prompt`: prompt_logps, prompt_lengths [E], of a prompt's tokens after its first one.
    `rewards`: rewards [E, K] of a reward model, in place of all log-probs, which are 0 then.
    """

    logps: jax.Array
    reference_logps: jax.Array
    lengths: jax.Array
    correct: jax.Array
    present: jax.Array
    weight: jax.Array
    label: jax.Array
    scores: jax.Array
    num_examples: jax.Array
    num_tokens: jax.Array
    carry: Carry
    shared_logps: jax.Array
    shared_reference_logps: jax.Array
    confidence: jax.Array
    prompt_logps: jax.Array
    prompt_lengths: jax.Array
    rewards: jax.Array

    @property
    def beta_scale(self) -> jax.Array:
        return self.carry["beta_scale"]

    def share(self, values: jax.Array) -> jax.Array:
        """The part of a mean over the whole batch's examples that the examples here make up: [E] -> []."""
        return self.metric(values).sum / self.num_examples

    def metric(self, values: jax.Array, among: jax.Array | bool = True) -> Metric:
        """The mean of values [E] over examples, or over those `among` [E] them."""
        counted = self.present & among
        return Metric(jnp.where(counted, self.weight * values, 0.0).sum(), jnp.where(counted, self.weight, 0.0).sum())

    def per_token(self, sums: jax.Array, lengths: jax.Array) -> Metric:
        """The mean over tokens, of sums [E] over the tokens of one completion of each example, and their number [E]."""
        return Metric(self.metric(sums).sum, self.metric(lengths).sum)

    def total(self, share: jax.Array) -> Metric:
        """A share of the batch's loss as a mean over examples."""
        return Metric(share * self.num_examples, jnp.where(self.present, self.weight, 0.0).sum())


class Objective(Protocol):
    """A frozen dataclass of hyper-parameters that turns completions into a loss.

    The returned loss is the microbatch's *share* of the batch's loss: shares, and their gradients, add up to it. Of an
    objective that couples the examples of a batch (a mean or an order over all of them enters each one's loss), it is
    called with the whole batch at once, whatever the microbatches.

    feedback: the rows it learns from. num_completions: K. statistics: what it needs besides log-prob sums.
    uses_labels, uses_scores: whether soft labels have a meaning for it, whether it cannot do without ratings.
    initial_carry, next_carry: scalars that go from one step to the next; the metrics are those of the whole batch.
    """

    feedback: ClassVar[Feedback]

    @property
    def name(self) -> str: ...
    @property
    def uses_labels(self) -> bool: ...
    @property
    def num_completions(self) -> int: ...
    @property
    def uses_reference(self) -> bool: ...
    @property
    def uses_scores(self) -> bool: ...
    @property
    def couples_examples(self) -> bool: ...
    @property
    def statistics(self) -> frozenset[Statistic]: ...
    def initial_carry(self) -> dict[str, float]: ...
    def next_carry(self, carry: Carry, metrics: Metrics, /) -> dict[str, jax.Array]: ...
    def __call__(self, completions: Completions, /) -> tuple[jax.Array, Metrics]: ...


class PackedBatch(NamedTuple, Generic[A]):
    """Examples packed into rows, on the host (`HostBatch`) or the devices (`DeviceBatch`).

    All int32 but references, labels and scores, which are float32; unused places hold 0.

    tokens, positions [M, R, T]: positions restart after the prompt for every completion.
    segments [M, R, T]: which context a token belongs to, from 1 in each row; 0 is padding.
    branches [M, R, T]: 0 for a prompt's token, k for one of completion k (from 1). A token attends to earlier tokens of
        its own segment that are of the prompt or of its own branch.
    target_positions, target_labels [M, R, S]: the hidden state at a position predicts a label, a token that is scored.
    target_slots [M, R, S]: the branch a target belongs to, x * B + b; X * B where there is no target.
    target_indices [M, R, S]: which of the scored tokens of its branch a target is, from 0.
    ends [M, R, X, K]: where in the row the last token of each completion lies.
    lengths [M, R, X, B]: tokens that are scored of each branch: all of a completion's, none of a prompt's unless the
        prompt is scored too, and then all but its first. 0 in an empty slot.
    references [M, R, X, Q, K]: the reference's statistics of every completion: log-prob sums first.
    labels [M, R, X], scores [M, R, X, K]: as in `Example`.
    num_microbatches []: microbatches that hold rows; the rest of M is there to keep shapes few.
    num_examples [], num_tokens [B]: examples of the whole batch, and its scored tokens by branch.
    """

    tokens: A
    positions: A
    segments: A
    branches: A
    target_positions: A
    target_labels: A
    target_slots: A
    target_indices: A
    ends: A
    lengths: A
    references: A
    labels: A
    scores: A
    num_microbatches: A
    num_examples: A
    num_tokens: A


HostBatch = PackedBatch[np.ndarray]
DeviceBatch = PackedBatch[jax.Array]
