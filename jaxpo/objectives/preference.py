"""Objectives over pairs: completion 0 is the chosen one, completion 1 the rejected one."""

from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import ConfigDict, Field, PositiveFloat
from pydantic.dataclasses import dataclass

from jaxpo.batch import Completions, Metric
from jaxpo.objectives import losses

STRICT = ConfigDict(extra="forbid", strict=True)


def pair_metrics(c: Completions, loss: jax.Array, beta: float) -> dict[str, Metric]:
    """The metrics of TRL's DPO trainer for pairs, from the loss [E] of each.

    A pair whose two rewards are equal counts one half in `rewards/accuracies` (TRL counts it as wrong), so that a
    policy equal to its reference stands at chance. `logps/accuracies` ranks by the policy's own log-probs alone.
    `kl/*` is the mean log-ratio per token of the data's completions, an off-policy estimate that can be negative.
    """
    n = c.present.sum()
    ratio = c.logps - c.reference_logps
    rewards = beta * ratio

    def mean(values: jax.Array) -> Metric:
        return Metric(jnp.where(c.present, values, 0.0).sum(), n)

    def ranked(scores: jax.Array) -> Metric:
        return mean(0.5 * (1.0 + jnp.sign(scores[:, 0] - scores[:, 1])))

    return {
        "loss": mean(loss),
        "rewards/chosen": mean(rewards[:, 0]),
        "rewards/rejected": mean(rewards[:, 1]),
        "rewards/margins": mean(rewards[:, 0] - rewards[:, 1]),
        "rewards/accuracies": ranked(rewards),
        "logps/chosen": mean(c.logps[:, 0]),
        "logps/rejected": mean(c.logps[:, 1]),
        "logps/accuracies": ranked(c.logps),
        "kl/chosen": Metric(ratio[:, 0].sum(), c.lengths[:, 0].sum()),
        "kl/rejected": Metric(ratio[:, 1].sum(), c.lengths[:, 1].sum()),
        "mean_token_accuracy": Metric(c.correct[:, 0].sum(), c.lengths[:, 0].sum()),
    }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DPO:
    """Direct preference optimisation; label_smoothing > 0 is conservative DPO. See `losses.dpo`."""

    name: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0

    num_completions: ClassVar[int] = 2
    uses_reference: ClassVar[bool] = True

    def __call__(self, c: Completions) -> tuple[jax.Array, dict[str, Metric]]:
        ratio = c.logps - c.reference_logps
        loss = losses.dpo(ratio[:, 0], ratio[:, 1], self.beta, self.label_smoothing)
        return jnp.where(c.present, loss, 0.0).sum() / c.num_examples, pair_metrics(c, loss, self.beta)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IPO:
    """Identity preference optimisation on mean log-ratios per token, or on sums with `normalize: false`.

    The authors' experiments use the mean (as TRL does); the paper's equation reads as the sum. See `losses.ipo`.
    """

    name: Literal["ipo"] = "ipo"
    beta: PositiveFloat = 0.1
    normalize: bool = True

    num_completions: ClassVar[int] = 2
    uses_reference: ClassVar[bool] = True

    def __call__(self, c: Completions) -> tuple[jax.Array, dict[str, Metric]]:
        ratio = c.logps - c.reference_logps
        scored = ratio / jnp.maximum(c.lengths, 1) if self.normalize else ratio
        loss = losses.ipo(scored[:, 0], scored[:, 1], self.beta)
        return jnp.where(c.present, loss, 0.0).sum() / c.num_examples, pair_metrics(c, loss, self.beta)
