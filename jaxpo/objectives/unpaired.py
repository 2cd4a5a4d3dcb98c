"""Objectives over single answers that are desirable or not: `label` is the probability that one is."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic.dataclasses import dataclass

from jaxpo.batch import Carry, Completions, Feedback, Metric, Metrics
from jaxpo.objectives import losses, reward_shift
from jaxpo.objectives.base import STRICT, Plain, Positive, in_order


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Unpaired(Plain):
    """An objective over labelled completions; a subclass gives its `__call__`."""

    beta: Positive = 0.1

    feedback: ClassVar[Feedback] = "label"

    @property
    def num_completions(self) -> int:
        return 1

    @property
    def uses_labels(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KTO(Unpaired):
    """Kahneman-Tversky optimisation. See `losses.kto`; Ethayarajh et al. 2024 (arXiv 2402.01306), sec. 4.1.

    The reference point is the mean log-ratio of the batch's mismatched completions (completion 1 of every example, an
    answer to another prompt), at least 0 and without a gradient. The paper's v1, eq. 8, and TRL advise weights such
    that desirable_weight * desirable rows : undesirable_weight * undesirable rows lies between 1 and 4/3; v4, eq. 9,
    has 3/2.
    """

    name: Literal["kto"] = "kto"
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0

    @property
    def num_completions(self) -> int:
        return 2

    @property
    def couples_examples(self) -> bool:
        return True

    def __call__(self, c: Completions) -> tuple[jax.Array, Metrics]:
        ratio, beta = c.logps - c.reference_logps, self.beta * c.beta_scale
        kl = jax.lax.stop_gradient(jnp.maximum(c.share(ratio[:, 1]), 0.0))
        loss = losses.kto(ratio[:, 0], kl, beta, c.label, self.desirable_weight, self.undesirable_weight)
        metrics = label_metrics(c, beta * ratio[:, 0], beta * kl)
        return c.share(loss), {"loss": c.metric(loss), "kl": c.metric(jnp.full_like(loss, kl)), **metrics}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BCO(Unpaired):
    """Binary classifier optimisation: rewards are logits, less a running mean. See `losses.bco`, `reward_shift`."""

    name: Literal["bco"] = "bco"

    @property
    def couples_examples(self) -> bool:
        return True

    def initial_carry(self) -> dict[str, float]:
        return reward_shift.initial()

    def next_carry(self, carry: Carry, metrics: Metrics) -> dict[str, jax.Array]:
        return reward_shift.updated(carry, metrics)

    def __call__(self, c: Completions) -> tuple[jax.Array, Metrics]:
        ratio, beta = (c.logps - c.reference_logps)[:, 0], self.beta * c.beta_scale
        rewards = reward_shift.counted(*chosen_and_rejected(c, beta * ratio).values())
        shift = reward_shift.after(c.carry, rewards)
        loss = losses.bco(ratio, shift, beta, c.label)
        metrics = {"loss": c.metric(loss), "reward_shift": c.metric(jnp.full_like(loss, shift)), **rewards}
        return c.share(loss), {**metrics, **label_metrics(c, beta * ratio, shift)}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class APOZeroUnpaired(Unpaired):
    """Anchored preference optimisation on single answers: KTO whose reference point is 0. See `losses`."""

    name: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0

    def __call__(self, c: Completions) -> tuple[jax.Array, Metrics]:
        ratio, beta = (c.logps - c.reference_logps)[:, 0], self.beta * c.beta_scale
        loss = losses.apo_zero_unpaired(ratio, beta, c.label, self.desirable_weight, self.undesirable_weight)
        return c.share(loss), {"loss": c.metric(loss), **label_metrics(c, beta * ratio, jnp.float32(0.0))}


def chosen_and_rejected(c: Completions, rewards: jax.Array) -> dict[str, Metric]:
    """The rewards [E] of desirable and of undesirable completions, under TRL's names for them."""
    desirable = c.label >= 0.5
    return {"rewards/chosen": c.metric(rewards, desirable), "rewards/rejected": c.metric(rewards, ~desirable)}


def label_metrics(c: Completions, rewards: jax.Array, anchor: jax.Array) -> Metrics:
    """The metrics of TRL's KTO trainer, from rewards [E] and the reward [] from which on a completion counts as good.

    `rewards/margins` follows from the two means once they are taken. `rewards/accuracies` (not TRL's): the rewards on
    their right side of the anchor, one half for one on it.
    """
    desirable = c.label >= 0.5
    above = in_order(rewards, anchor)
    ratio = (c.logps - c.reference_logps)[:, 0]
    return {
        **chosen_and_rejected(c, rewards),
        "rewards/accuracies": c.metric(jnp.where(desirable, above, 1.0 - above)),
        "logps/chosen": c.metric(c.logps[:, 0], desirable),
        "logps/rejected": c.metric(c.logps[:, 0], ~desirable),
        "mean_token_accuracy": c.per_token(
            jnp.where(desirable, c.correct[:, 0], 0.0), jnp.where(desirable, c.lengths[:, 0], 0)
        ),
        "kl/abs": c.metric(jnp.abs(ratio)),
    }


AnyUnpaired = KTO | BCO | APOZeroUnpaired
