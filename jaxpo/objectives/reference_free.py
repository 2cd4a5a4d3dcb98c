"""Objectives over pairs that need no reference model."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from jaxpo.batch import Completions, Metrics, Statistic
from jaxpo.objectives import losses
from jaxpo.objectives.base import STRICT, NotNegative, Positive
from jaxpo.objectives.modifiers import chosen_nll, without_reference
from jaxpo.objectives.pairwise import Pairs, Pairwise
from jaxpo.objectives.preference import PairWithReference, Smoothing


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReferenceFreePairwise(Pairwise):
    """An objective over pairs for which the reference is uniform: log-ratios are log-probs."""

    @property
    def uses_reference(self) -> bool:
        return False

    @property
    def takes_labels(self) -> bool:
        return True

    @property
    def takes_margin(self) -> bool:
        return True

    @property
    def takes_log_probs(self) -> bool:
        return True

    @property
    def own_nll(self) -> float:
        """The coefficient of the objective's own likelihood term."""
        return 0.0

    @property
    def imitates(self) -> bool:
        return self.own_nll > 0 or super().imitates

    @model_validator(mode="after")
    def _check_reference_free(self) -> Any:
        if any(m.reference_free for m in self.modifiers):
            raise ValueError("modifiers has reference_free, but this objective uses no reference anyway; leave it out")
        if self.own_nll > 0 and super().imitates:
            raise ValueError("modifiers has nll, but this objective has a likelihood term of its own; leave one out")
        return self

    def pairs(self, c: Completions) -> Pairs:
        # In a mixture there may be a reference, which is another objective's; and a beta that holds on to none stays.
        return super().pairs(without_reference(c))._replace(beta=jnp.float32(self.beta))

    def __call__(self, c: Completions) -> tuple[jax.Array, Metrics]:
        share, metrics = super().__call__(c)
        if not self.own_nll:
            return share, metrics
        nll, metric = chosen_nll(c, prompt="prompt" in self.statistics)
        share = share + self.own_nll * nll
        return share, {**metrics, "loss": c.total(share), "nll_loss": metric}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CPO(ReferenceFreePairwise):
    """Contrastive preference optimisation: DPO against a uniform reference, and the chosen answers' likelihood.

    Xu et al. 2024 (arXiv 2401.08417), eq. 3 and 5. nll_coefficient: TRL's cpo_alpha.
    """

    name: Literal["cpo"] = "cpo"
    nll_coefficient: NotNegative = 1.0
    label_smoothing: Smoothing = 0.0

    @property
    def own_nll(self) -> float:
        return self.nll_coefficient

    def loss(self, pairs: Pairs) -> jax.Array:
        delta = pairs.chosen - pairs.rejected - pairs.margin / pairs.beta
        return losses.dpo(delta, pairs.beta, losses.smooth(pairs.label, self.label_smoothing))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SimPO(ReferenceFreePairwise):
    """Simple preference optimisation: mean log-probs as rewards, which are to differ by gamma. See `losses.simpo`.

    The paper's beta is 2 or 2.5, its gamma 0.1 to 0.8 times that, and its authors advise to begin at 0.5 times.
    nll_coefficient > 0 is CPO-SimPO.
    """

    name: Literal["simpo"] = "simpo"
    beta: Positive = 2.0
    gamma: NotNegative = 1.0
    nll_coefficient: NotNegative = 0.0
    label_smoothing: Smoothing = 0.0

    @property
    def own_nll(self) -> float:
        return self.nll_coefficient

    def scores(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        return pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length

    def rewards(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        chosen, rejected = self.scores(pairs)
        return pairs.beta * chosen, pairs.beta * rejected

    def loss(self, pairs: Pairs) -> jax.Array:
        label = losses.smooth(pairs.label, self.label_smoothing)
        return losses.simpo(*self.scores(pairs), pairs.beta, self.gamma + pairs.margin, label)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AlphaPO(SimPO):
    """SimPO with rewards of another shape: (1 - p^-alpha) / alpha of the mean log-prob. See `losses.alpha_reward`."""

    name: Literal["alphapo"] = "alphapo"  # pyright: ignore[reportIncompatibleVariableOverride]
    alpha: float = 0.25

    def scores(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        chosen, rejected = super().scores(pairs)
        return losses.alpha_reward(chosen, self.alpha), losses.alpha_reward(rejected, self.alpha)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ORPO(ReferenceFreePairwise):
    """Odds ratio preference optimisation: SFT on the chosen answers and beta (the paper's lambda) times an odds ratio.

    Hong et al. 2024 (arXiv 2403.07691), eq. 6. Odds are those of mean log-probs. nll_tokens: the likelihood term's
    tokens, those of the completion, or all of them, as TRL, and the authors' code unless told otherwise.
    """

    name: Literal["orpo"] = "orpo"
    nll_tokens: Literal["completion", "all"] = "completion"

    @property
    def takes_labels(self) -> bool:
        return False

    @property
    def takes_margin(self) -> bool:
        return False

    @property
    def statistics(self) -> frozenset[Statistic]:
        more: frozenset[Statistic] = frozenset({"prompt"} if self.nll_tokens == "all" else ())
        return super().statistics | more

    @property
    def own_nll(self) -> float:
        return 1.0

    def log_odds(self, pairs: Pairs) -> jax.Array:
        return losses.odds_ratio(pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length)

    def rewards(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        return (
            pairs.beta * pairs.chosen / pairs.chosen_length,
            pairs.beta * pairs.rejected / pairs.rejected_length,
        )

    def loss(self, pairs: Pairs) -> jax.Array:
        return pairs.beta * losses.orpo(self.log_odds(pairs))

    def own_metrics(self, pairs: Pairs) -> Metrics:
        log_odds = self.log_odds(pairs)
        seen = pairs.seen
        return {"log_odds_chosen": seen.metric(log_odds), "log_odds_ratio": seen.metric(-losses.orpo(log_odds))}


AnyPair = PairWithReference | CPO | SimPO | AlphaPO | ORPO
