"""Objectives over lists of answers, the best one first; lists may be of different lengths, up to max_completions."""

from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from jaxpo.batch import Completions, Feedback, Metrics, Statistic
from jaxpo.objectives import losses
from jaxpo.objectives.base import STRICT, Plain, Positive, in_order
from jaxpo.objectives.reference_free import AnyPair

# A step's arrays have places for the longest list, whatever the data's are: nobody ranks more answers than this.
Most = Annotated[int, Field(ge=2, le=64)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlackettLuce(Plain):
    """DPO on whole rankings under Plackett and Luce's model; with two answers it is DPO. See `losses.plackett_luce`."""

    name: Literal["plackett_luce"] = "plackett_luce"
    beta: Positive = 0.1
    max_completions: Most = 4

    feedback: ClassVar[Feedback] = "ranking"

    @property
    def num_completions(self) -> int:
        return self.max_completions

    def __call__(self, c: Completions) -> tuple[jax.Array, Metrics]:
        rewards = self.beta * c.beta_scale * (c.logps - c.reference_logps)
        loss = losses.plackett_luce(rewards, c.lengths > 0)
        return c.share(loss), {"loss": c.metric(loss), **list_metrics(c, rewards)}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AllPairs(Plain):
    """Every pair of a list, the better answer as chosen: the mean of a list's pairs, then over lists.

    As the reward model of Ouyang et al. 2022 (arXiv 2203.02155), eq. 1, for any objective over pairs. The prompt and
    each answer are computed once, whatever the number of pairs.
    """

    name: Literal["all_pairs"] = "all_pairs"
    pair: Annotated[AnyPair, Field(discriminator="name")]
    max_completions: Most = 4

    feedback: ClassVar[Feedback] = "ranking"

    @model_validator(mode="after")
    def _check_pair(self) -> Any:
        if self.pair.couples_examples:
            raise ValueError(
                f"pair is {self.pair.name}, which couples the pairs of a batch; expected one that does not"
            )
        for m in self.pair.modifiers:
            if not m.per_pair:
                raise ValueError(f"pair.modifiers has {m.name}, which does not apply to every pair of a list")
        if self.pair.imitates:
            raise ValueError(f"pair is {self.pair.name}, which imitates one chosen answer; a list has none of its own")
        return self

    @property
    def num_completions(self) -> int:
        return self.max_completions

    @property
    def uses_reference(self) -> bool:
        return self.pair.uses_reference

    @property
    def uses_labels(self) -> bool:
        return self.pair.uses_labels

    @property
    def uses_scores(self) -> bool:
        return self.pair.uses_scores

    @property
    def statistics(self) -> frozenset[Statistic]:
        return self.pair.statistics

    def __call__(self, c: Completions) -> tuple[jax.Array, Metrics]:
        return self.pair(pairs_of_lists(c))


def pairs_of_lists(c: Completions) -> Completions:
    """Lists [E, K] as pairs [E * P, 2], P = K (K - 1) / 2; a list's pairs weigh 1 together."""
    K = c.lengths.shape[1]
    better, worse = places_of_pairs(K)

    def pairs(values: jax.Array) -> jax.Array:
        return jnp.stack([values[:, better], values[:, worse]], axis=-1).reshape(-1, 2)

    def each(values: jax.Array) -> jax.Array:
        return jnp.repeat(values, len(better))

    lengths = pairs(c.lengths)
    present = each(c.present) & (lengths > 0).all(axis=1)
    sizes = (c.lengths > 0).sum(axis=1)
    return c._replace(
        logps=pairs(c.logps),
        reference_logps=pairs(c.reference_logps),
        lengths=lengths,
        correct=pairs(c.correct),
        present=present,
        weight=each(c.weight / jnp.maximum(sizes * (sizes - 1) / 2, 1)),
        label=each(c.label),
        scores=pairs(c.scores),
        shared_logps=pairs(c.shared_logps),
        shared_reference_logps=pairs(c.shared_reference_logps),
        confidence=pairs(c.confidence),
        prompt_logps=each(c.prompt_logps),
        prompt_lengths=each(c.prompt_lengths),
        rewards=pairs(c.rewards),
    )


def places_of_pairs(K: int) -> tuple[list[int], list[int]]:
    """The places of the better and of the worse one in every pair of a list of K."""
    both = list(combinations(range(K), 2))
    return [i for i, _ in both], [j for _, j in both]


def list_metrics(c: Completions, rewards: jax.Array) -> Metrics:
    """Metrics of lists, from rewards [E, K].

    `rewards/chosen`, `rewards/rejected`: of the best answer, and of the others on average. `rewards/accuracies`: pairs
    of a list in the right order; `rewards/top1`: lists whose best answer has the most. A tie counts one half in both.
    """
    there = c.lengths > 0
    others = jnp.maximum(there.sum(axis=1) - 1, 1)
    best, rest = rewards[:, 0], jnp.where(there[:, 1:], rewards[:, 1:], 0.0).sum(axis=1) / others
    pairs = pairs_of_lists(c._replace(rewards=rewards))
    rival = jnp.where(there[:, 1:], rewards[:, 1:], -jnp.inf).max(axis=1)
    rejected = jnp.where(there[:, 1:], c.logps[:, 1:], 0.0).sum(axis=1) / others
    distances = jnp.where(there, jnp.abs(c.logps - c.reference_logps), 0.0)
    return {
        "rewards/chosen": c.metric(best),
        "rewards/rejected": c.metric(rest),
        "rewards/margins": c.metric(best - rest),
        "rewards/accuracies": pairs.metric(in_order(pairs.rewards[:, 0], pairs.rewards[:, 1])),
        "rewards/top1": c.metric(in_order(best, rival)),
        "logps/chosen": c.metric(c.logps[:, 0]),
        "logps/rejected": c.metric(rejected),
        "mean_token_accuracy": c.per_token(c.correct[:, 0], c.lengths[:, 0]),
        "kl/abs": c.metric(distances.sum(axis=1) / jnp.maximum(there.sum(axis=1), 1)),
    }
