"""Pieces that any pair objective can be composed with: `modifiers: [{name: wpo}, {name: nll, coefficient: 1.0}]`.

A modifier may change what the loss sees, ask for a margin, weight each pair, or add a term of its own.
"""

from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field
from pydantic.dataclasses import dataclass

from jaxpo.batch import Completions, Metric, Metrics, Statistic
from jaxpo.objectives.base import STRICT, Positive


class Modifier:
    """Changes nothing; each modifier overrides what it is there for.

    statistics, uses_scores: as of an objective. reference_free: whether it takes the reference out of the loss.
    asks_margin: whether it needs a loss of the difference of two rewards; sets_labels: one with soft labels;
    weighs_pairs: one that has a loss for each pair. per_pair: whether it makes sense for every pair of a ranked list.
    """

    statistics: ClassVar[frozenset[Statistic]] = frozenset()
    uses_scores: ClassVar[bool] = False
    reference_free: ClassVar[bool] = False
    asks_margin: ClassVar[bool] = False
    sets_labels: ClassVar[bool] = False
    weighs_pairs: ClassVar[bool] = False
    per_pair: ClassVar[bool] = True

    def completions(self, c: Completions) -> Completions:
        """What the loss sees in place of `c`."""
        return c

    def margin(self, c: Completions) -> jax.Array:
        """By how much the chosen reward should be the larger one, [E] or []."""
        return jnp.float32(0.0)

    def weight(self, c: Completions) -> jax.Array:
        """What a pair's loss is multiplied with, [E] or [], without a gradient."""
        return jnp.float32(1.0)

    def term(self, c: Completions) -> tuple[jax.Array, Metrics]:
        """A share of the batch's loss to add, and its metrics."""
        return jnp.float32(0.0), {}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WPO(Modifier):
    """Pairs weighted by how likely the policy itself is to write them, so that off-policy data looks on-policy.

    Zhou et al. 2024 (arXiv 2406.11827), eq. 2, as TRL's use_weighting: the product of both completions'
    exp(mean over tokens of log p(token) - log sum_v p(v)^2), without a gradient.
    """

    name: Literal["wpo"] = "wpo"

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"confidence"})
    weighs_pairs: ClassVar[bool] = True

    def weight(self, c: Completions) -> jax.Array:
        return jnp.exp((c.confidence / jnp.maximum(c.lengths, 1)).sum(axis=1))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LD(Modifier):
    """Length-desensitised: tokens beyond the shorter completion's length count alpha, of policy and of reference.

    Liu et al. 2024 (arXiv 2409.06411), the likelihood of LD-DPO. alpha = 1 changes nothing.
    """

    name: Literal["ld"] = "ld"
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"shared"})
    per_pair: ClassVar[bool] = False

    def completions(self, c: Completions) -> Completions:
        def shortened(whole: jax.Array, shared: jax.Array) -> jax.Array:
            return shared + self.alpha * (whole - shared)

        return c._replace(
            logps=shortened(c.logps, c.shared_logps),
            reference_logps=shortened(c.reference_logps, c.shared_reference_logps),
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NLL(Modifier):
    """Adds coefficient times the mean negative log-likelihood per chosen token of the batch: chosen stay likely.

    The DPO+NLL loss of Pang et al. 2024 (arXiv 2404.19733), which takes the mean answer by answer; RPO, Liu et al.
    2024 (arXiv 2405.16436).
    """

    name: Literal["nll"] = "nll"
    coefficient: Positive = 1.0

    per_pair: ClassVar[bool] = False

    def term(self, c: Completions) -> tuple[jax.Array, Metrics]:
        nll, metric = chosen_nll(c)
        return self.coefficient * nll, {"nll_loss": metric}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReferenceFree(Modifier):
    """Takes the reference for uniform: log-ratios become log-probs, and no reference model is needed."""

    name: Literal["reference_free"] = "reference_free"

    reference_free: ClassVar[bool] = True

    def completions(self, c: Completions) -> Completions:
        return without_reference(c)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScoreMargin(Modifier):
    """Asks for a margin between the rewards of scale times the gap of the ratings, or of its logarithm.

    Gap: as the margin of Llama 2, Touvron et al. 2023 (arXiv 2307.09288), eq. 2, whose steps are those of a rating.
    Log: as the offset of ODPO, Amini et al. 2024 (arXiv 2402.10571), alpha log(gap) with alpha = scale, which is
    negative below a gap of 1; here it is log(1 + gap), so that no gap asks for no margin.
    """

    name: Literal["score_margin"] = "score_margin"
    scale: Positive = 1.0
    of: Literal["gap", "log_gap"] = "gap"

    uses_scores: ClassVar[bool] = True
    asks_margin: ClassVar[bool] = True

    def margin(self, c: Completions) -> jax.Array:
        gap = c.scores[:, 0] - c.scores[:, 1]
        return self.scale * (gap if self.of == "gap" else jnp.log1p(jnp.maximum(gap, 0.0)))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScoreLabels(Modifier):
    """Soft labels from ratings: the probability of Bradley and Terry that the chosen one is better, sigmoid(scale gap).

    With `dpo` it is the InfoNCA loss of two answers, Chen et al. 2024 (arXiv 2402.05369).
    """

    name: Literal["score_labels"] = "score_labels"
    scale: Positive = 1.0

    uses_scores: ClassVar[bool] = True
    sets_labels: ClassVar[bool] = True

    def completions(self, c: Completions) -> Completions:
        return c._replace(label=jax.nn.sigmoid(self.scale * (c.scores[:, 0] - c.scores[:, 1])))


def without_reference(c: Completions) -> Completions:
    """The completions with a reference that finds all of them equally likely."""
    nothing = jnp.zeros_like(c.reference_logps)
    return c._replace(reference_logps=nothing, shared_reference_logps=nothing)


def chosen_nll(c: Completions, prompt: bool = False) -> tuple[jax.Array, Metric]:
    """A share of the mean NLL per token of all chosen completions of the batch, and that mean as a metric.

    prompt: whether the tokens of their prompts count too.
    """
    logps, lengths, of_batch = c.logps[:, 0], c.lengths[:, 0], c.num_tokens[1]
    if prompt:
        logps, lengths, of_batch = logps + c.prompt_logps, lengths + c.prompt_lengths, of_batch + c.num_tokens[0]
    nll = c.per_token(-logps, lengths)
    return nll.sum / of_batch, nll


AnyModifier = Annotated[WPO | LD | NLL | ReferenceFree | ScoreMargin | ScoreLabels, Field(discriminator="name")]
