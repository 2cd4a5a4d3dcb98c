"""Reward models: a score for each answer, learnt from which answer is better."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic.dataclasses import dataclass

from jaxpo.batch import Completions, Feedback, Metrics, Statistic
from jaxpo.objectives import losses
from jaxpo.objectives.base import STRICT, NotNegative, Plain, in_order
from jaxpo.objectives.ranked import Most, pairs_of_lists

# Bins of the confidence in a pair's order, from 1/2 to 1, for `calibration_error`.
BINS = 10


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Reward(Plain):
    """A reward model by Bradley and Terry, on pairs or lists: the decoder with a head of one score, at the last token.

    See `losses.bradley_terry`. margin: ask for the gap of the ratings (or the data's margin), times this, between two
    rewards; Touvron et al. 2023 (arXiv 2307.09288), eq. 2. center_rewards_coefficient: pulls the sum of a pair's
    rewards to 0; Eisenstein et al. 2023 (arXiv 2312.09244), eq. 2. A list counts by the mean of its pairs.
    """

    name: Literal["reward"] = "reward"
    margin: NotNegative = 0.0
    center_rewards_coefficient: NotNegative = 0.0
    max_completions: Most = 4

    feedback: ClassVar[Feedback] = "ranking"

    @property
    def num_completions(self) -> int:
        return self.max_completions

    @property
    def uses_reference(self) -> bool:
        return False

    @property
    def uses_labels(self) -> bool:
        return True

    @property
    def uses_scores(self) -> bool:
        return self.margin > 0

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset({"rewards"})

    def __call__(self, c: Completions) -> tuple[jax.Array, Metrics]:
        pairs = pairs_of_lists(c)
        chosen, rejected = pairs.rewards[:, 0], pairs.rewards[:, 1]
        margin = self.margin * (pairs.scores[:, 0] - pairs.scores[:, 1])
        loss = losses.bradley_terry(chosen, rejected, margin, pairs.label)
        loss = loss + self.center_rewards_coefficient * jnp.square(chosen + rejected)
        return pairs.share(loss), {"loss": pairs.metric(loss), **reward_metrics(c, pairs)}


def reward_metrics(c: Completions, pairs: Completions) -> Metrics:
    """TRL's accuracy, margin and mean_reward, a pair with equal rewards counting one half; and how sure it is to be.

    confidence: the probability it gives to its own order of a pair. `calibration/N`: what accuracy exceeds confidence
    by among pairs of the Nth bin of confidence, as a part of all pairs; `calibration_error` is the sum of their
    absolute values (the expected calibration error of Guo et al. 2017, arXiv 1706.04599).
    """
    gap = pairs.rewards[:, 0] - pairs.rewards[:, 1]
    right, confidence = in_order(*pairs.rewards.T), jax.nn.sigmoid(jnp.abs(gap))
    bins = jnp.minimum(((confidence - 0.5) * 2 * BINS).astype(jnp.int32), BINS - 1)
    there = c.lengths > 0
    mean = jnp.where(there, c.rewards, 0.0).sum(axis=1) / jnp.maximum(there.sum(axis=1), 1)
    return {
        "accuracy": pairs.metric(right),
        "margin": pairs.metric(gap),
        "mean_reward": c.metric(mean),
        "confidence": pairs.metric(confidence),
        **{f"calibration/{n}": pairs.metric(jnp.where(bins == n, right - confidence, 0.0)) for n in range(BINS)},
    }
