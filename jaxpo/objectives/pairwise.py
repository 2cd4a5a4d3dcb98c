"""The frame of every objective over pairs: modifiers, then the loss of each pair, then shares and metrics.

Completion 0 is the chosen one, completion 1 the rejected one.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from jaxpo.batch import Completions, Metrics, Statistic
from jaxpo.objectives.base import STRICT, Plain, Positive, in_order
from jaxpo.objectives.divergences import AnyDivergence, ReverseKL
from jaxpo.objectives.modifiers import NLL, AnyModifier


class Pairs(NamedTuple):
    """What the loss of pairs sees: arrays [E], and beta [] as it is at this step.

    chosen, rejected: log-ratios to the reference. margin: by how much the chosen reward should be the larger one.
    seen: the completions they come from, as the modifiers left them.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array
    label: jax.Array
    margin: jax.Array
    beta: jax.Array
    seen: Completions


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Pairwise(Plain):
    """An objective over pairs. A subclass gives `loss`; where its reward is not beta times a log-ratio, `rewards` too.

    modifiers: see `objectives.modifiers`.
    """

    beta: Positive = 0.1
    modifiers: tuple[AnyModifier, ...] = ()

    @property
    def uses_reference(self) -> bool:
        return not any(m.reference_free for m in self.modifiers)

    @property
    def uses_scores(self) -> bool:
        return any(m.uses_scores for m in self.modifiers)

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset().union(*(m.statistics for m in self.modifiers))

    @property
    def uses_labels(self) -> bool:
        """Whether the rows' soft labels have a meaning: not where a modifier sets others in their place."""
        return self.takes_labels and not any(m.sets_labels for m in self.modifiers)

    @property
    def takes_labels(self) -> bool:
        """Whether the loss is one of soft labels too."""
        return False

    @property
    def takes_margin(self) -> bool:
        """Whether the loss is one of the difference of two rewards, which a margin can be asked of."""
        return False

    @property
    def takes_log_probs(self) -> bool:
        """Whether log-probs can stand for log-ratios: only their difference counts, for they lie far below 0."""
        return False

    @property
    def imitates(self) -> bool:
        """Whether a likelihood term of the chosen completion is part of it."""
        return any(isinstance(m, NLL) for m in self.modifiers)

    @property
    def has_pair_losses(self) -> bool:
        """Whether the loss of a place belongs to the pair in it."""
        return True

    @model_validator(mode="after")
    def _check_modifiers(self) -> Any:
        names = [m.name for m in self.modifiers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"modifiers has {name} {names.count(name)} times; expected each of them once")
        for m in self.modifiers:
            if m.asks_margin and not self.takes_margin:
                raise ValueError(
                    f"modifiers has {m.name}, which asks for a margin between two rewards, but this loss is not one of "
                    "their difference; expected an objective such as dpo, hinge, ipo or simpo"
                )
            if m.sets_labels and not self.takes_labels:
                raise ValueError(
                    f"modifiers has {m.name}, but this loss has no soft labels; expected one such as dpo or ipo"
                )
            if m.reference_free and not self.takes_log_probs:
                raise ValueError(
                    f"modifiers has {m.name}, which puts log-probs in the place of log-ratios, but this loss "
                    "is not one of their difference alone; expected one such as dpo, hinge or ipo, with the divergence "
                    "reverse_kl, or an objective that needs no reference by itself"
                )
            if m.weighs_pairs and not self.has_pair_losses:
                raise ValueError(
                    f"modifiers has {m.name}, which weighs each pair, but this loss is one of order statistics, which "
                    "belong to no pair; leave it out"
                )
        return self

    def loss(self, pairs: Pairs) -> jax.Array:
        """The loss [E] of each pair."""
        raise TypeError(f"{type(self).__name__} has no loss")

    def margin(self, c: Completions) -> jax.Array:
        """What the modifiers ask for, [E]."""
        return sum((m.margin(c) for m in self.modifiers), jnp.zeros(c.present.shape))

    def rewards(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        """The implicit rewards [E] of both, for the metrics."""
        return pairs.beta * pairs.chosen, pairs.beta * pairs.rejected

    def own_metrics(self, pairs: Pairs) -> Metrics:
        """Metrics that this objective has besides those of all."""
        return {}

    def pairs(self, c: Completions) -> Pairs:
        for m in self.modifiers:
            c = m.completions(c)
        ratio = c.logps - c.reference_logps
        lengths = jnp.maximum(c.lengths, 1)
        return Pairs(
            chosen=ratio[:, 0],
            rejected=ratio[:, 1],
            chosen_length=lengths[:, 0],
            rejected_length=lengths[:, 1],
            label=c.label,
            margin=self.margin(c),
            beta=self.beta * c.beta_scale,
            seen=c,
        )

    def __call__(self, c: Completions) -> tuple[jax.Array, Metrics]:
        pairs = self.pairs(c)
        loss = self.loss(pairs)
        for m in self.modifiers:
            loss = jax.lax.stop_gradient(jnp.where(c.present, m.weight(c), 0.0)) * loss
        terms = [m.term(c) for m in self.modifiers]
        total = c.share(loss) + sum(share for share, _ in terms)
        metrics = {"loss": c.total(total), **pair_metrics(pairs.seen, *self.rewards(pairs))}
        if self.uses_reference:
            metrics |= distance_metrics(c)
        return total, merged([metrics, *(more for _, more in terms), self.own_metrics(pairs)])


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Margin(Pairwise):
    """An objective over the difference of two scores; divergence: what makes a log-ratio a score."""

    divergence: AnyDivergence = ReverseKL()

    @property
    def takes_margin(self) -> bool:
        return True

    @property
    def takes_log_probs(self) -> bool:
        return isinstance(self.divergence, ReverseKL)

    def delta(self, pairs: Pairs) -> jax.Array:
        """The difference [E] of the scores, less the margin that was asked for."""
        return self.divergence(pairs.chosen) - self.divergence(pairs.rejected) - pairs.margin / pairs.beta

    def mean_delta(self, pairs: Pairs) -> jax.Array:
        """As `delta`, of the scores per token."""
        chosen = self.divergence(pairs.chosen) / pairs.chosen_length
        rejected = self.divergence(pairs.rejected) / pairs.rejected_length
        return chosen - rejected - pairs.margin / pairs.beta


def merged(parts: Iterable[Metrics]) -> Metrics:
    return {name: metric for part in parts for name, metric in part.items()}


def pair_metrics(c: Completions, chosen_reward: jax.Array, rejected_reward: jax.Array) -> Metrics:
    """The metrics of TRL's DPO trainer for pairs, from their rewards [E].

    A pair whose two rewards are equal counts one half in `rewards/accuracies` (TRL counts it as wrong), so that a
    policy equal to its reference stands at chance. `logps/accuracies` ranks by the policy's own log-probs alone.
    """
    return {
        "rewards/chosen": c.metric(chosen_reward),
        "rewards/rejected": c.metric(rejected_reward),
        "rewards/margins": c.metric(chosen_reward - rejected_reward),
        "rewards/accuracies": c.metric(in_order(chosen_reward, rejected_reward)),
        "logps/chosen": c.metric(c.logps[:, 0]),
        "logps/rejected": c.metric(c.logps[:, 1]),
        "logps/accuracies": c.metric(in_order(c.logps[:, 0], c.logps[:, 1])),
        "mean_token_accuracy": c.per_token(c.correct[:, 0], c.lengths[:, 0]),
    }


def distance_metrics(c: Completions) -> Metrics:
    """How far the policy is from its reference on the data's completions.

    `kl/chosen`, `kl/rejected`: the mean log-ratio per token, an off-policy estimate that can be negative. `kl/abs`: the
    mean of |log-ratio| of a completion, in nats.
    """
    ratio = c.logps - c.reference_logps
    return {
        "kl/chosen": c.per_token(ratio[:, 0], c.lengths[:, 0]),
        "kl/rejected": c.per_token(ratio[:, 1], c.lengths[:, 1]),
        "kl/abs": c.metric(jnp.abs(ratio).mean(axis=1)),
    }
