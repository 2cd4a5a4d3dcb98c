"""Objectives over pairs that hold on to a reference; each one's loss is the function of its name in `losses`."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field
from pydantic.dataclasses import dataclass

from jaxpo.batch import Carry, Completions, Metrics
from jaxpo.objectives import losses, reward_shift
from jaxpo.objectives.base import STRICT, Positive
from jaxpo.objectives.pairwise import Margin, Pairs, Pairwise

Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]

# A divergence's score can be as large as e^80, whose square float32 does not hold: beyond this IPO has no gradient.
LARGEST_SQUARED = 1e18


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Labelled(Margin):
    """An objective whose loss is one of soft labels too; label_smoothing: the part of the labels taken for flipped."""

    label_smoothing: Smoothing = 0.0

    @property
    def takes_labels(self) -> bool:
        return True

    def label(self, pairs: Pairs) -> jax.Array:
        """The probability [E] that the chosen answer is the better one, smoothed."""
        return losses.smooth(pairs.label, self.label_smoothing)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DPO(Labelled):
    """Direct preference optimisation; label_smoothing > 0 is conservative DPO. See `losses.dpo`."""

    name: Literal["dpo"] = "dpo"

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.dpo(self.delta(pairs), pairs.beta, self.label(pairs))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DPONorm(Labelled):
    """DPO on mean log-ratios per token, so that length earns nothing; it wants a larger beta than DPO.

    As TRL's sigmoid_norm; length-normalised DPO of Lambert et al. 2024, Tülu 3 (arXiv 2411.15124), eq. 6, with a beta
    of 5 there.
    """

    name: Literal["dpo_norm"] = "dpo_norm"
    beta: Positive = 2.0

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.dpo(self.mean_delta(pairs), pairs.beta, self.label(pairs))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Hinge(Margin):
    """Hinge loss on implicit rewards. See `losses.hinge`."""

    name: Literal["hinge"] = "hinge"

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.hinge(self.delta(pairs), pairs.beta)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IPO(Labelled):
    """Identity preference optimisation on mean log-ratios per token, or on sums with `normalize: false`.

    The authors' experiments use the mean (as TRL does); the paper's equation reads as the sum. See `losses.ipo`.
    """

    name: Literal["ipo"] = "ipo"
    normalize: bool = True

    def loss(self, pairs: Pairs) -> jax.Array:
        delta = self.mean_delta(pairs) if self.normalize else self.delta(pairs)
        delta = jnp.clip(delta, -LARGEST_SQUARED, LARGEST_SQUARED)
        return losses.ipo(delta, pairs.beta, self.label(pairs))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Robust(Margin):
    """Robust DPO for labels of which a known part is flipped. See `losses.robust`."""

    name: Literal["robust"] = "robust"
    label_smoothing: Smoothing = 0.1

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.robust(self.delta(pairs), pairs.beta, self.label_smoothing)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EXO(Labelled):
    """Efficient exact optimisation; label_smoothing keeps the labels off 0 and 1. See `losses.exo`."""

    name: Literal["exo"] = "exo"
    label_smoothing: Annotated[float, Field(gt=0.0, lt=0.5)] = 1e-3

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.exo(self.delta(pairs), pairs.beta, self.label(pairs))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DiscoPOP(Margin):
    """The log-ratio modulated loss, found by a language model. See `losses.discopop`."""

    name: Literal["discopop"] = "discopop"
    tau: Positive = 0.05

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.discopop(self.delta(pairs), pairs.beta, self.tau)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RDPO(Labelled):
    """DPO with a penalty on length: each token more of the chosen answer makes up for alpha of the rewards' difference.

    Park et al. 2024 (arXiv 2403.19159), R-DPO: -ls(beta (c - r) + alpha (chosen tokens - rejected tokens)). What an
    answer wins by its length alone teaches nothing then.
    """

    name: Literal["rdpo"] = "rdpo"
    alpha: Positive = 0.01

    def margin(self, c: Completions) -> jax.Array:
        return super().margin(c) - self.alpha * (c.lengths[:, 0] - c.lengths[:, 1])

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.dpo(self.delta(pairs), pairs.beta, self.label(pairs))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DPOP(Pairwise):
    """DPO-positive (Smaug): the chosen answer is not to become less likely than it was. See `losses.dpop`."""

    name: Literal["dpop"] = "dpop"
    penalty: Positive = 50.0

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.dpop(pairs.chosen, pairs.rejected, pairs.beta, self.penalty)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NCA(Pairwise):
    """Noise contrastive alignment: absolute likelihoods, not their difference alone. See `losses.nca`."""

    name: Literal["nca"] = "nca"

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.nca(pairs.chosen, pairs.rejected, pairs.beta)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SPPO(Pairwise):
    """Self-play preference optimisation with hard wins. See `losses.sppo`."""

    name: Literal["sppo"] = "sppo"

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.sppo(pairs.chosen, pairs.rejected, pairs.beta)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class APOZero(Pairwise):
    """Anchored preference optimisation where chosen answers are better than the model's own. See `losses.apo_zero`."""

    name: Literal["apo_zero"] = "apo_zero"

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.apo_zero(pairs.chosen, pairs.rejected, pairs.beta)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class APODown(Pairwise):
    """Anchored preference optimisation where chosen answers are worse than the model's own. See `losses.apo_down`."""

    name: Literal["apo_down"] = "apo_down"

    def loss(self, pairs: Pairs) -> jax.Array:
        return losses.apo_down(pairs.chosen, pairs.rejected, pairs.beta)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BCOPair(Pairwise):
    """Binary classifier optimisation on pairs; reward_shift: less the running mean of all rewards, as in the paper.

    See `losses.bco_pair` and `reward_shift`.
    """

    name: Literal["bco_pair"] = "bco_pair"
    reward_shift: bool = False

    @property
    def couples_examples(self) -> bool:
        return self.reward_shift

    def initial_carry(self) -> dict[str, float]:
        return reward_shift.initial() if self.reward_shift else {}

    def next_carry(self, carry: Carry, metrics: Metrics) -> dict[str, jax.Array]:
        return reward_shift.updated(carry, metrics) if self.reward_shift else {}

    def own_metrics(self, pairs: Pairs) -> Metrics:
        if not self.reward_shift:
            return {}
        chosen, rejected = self.rewards(pairs)
        return reward_shift.counted(pairs.seen.metric(chosen), pairs.seen.metric(rejected))

    def loss(self, pairs: Pairs) -> jax.Array:
        shift = reward_shift.after(pairs.seen.carry, self.own_metrics(pairs)) if self.reward_shift else 0.0
        return losses.bco_pair(pairs.chosen, pairs.rejected, pairs.beta, shift)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OrderStatistics(Pairwise):
    """An objective over sorted values of the whole batch, whatever the microbatches and devices; no loss is a pair's.

    Melnyk et al. 2024 (arXiv 2406.05882), alignment by optimal transport. The larger the batch, the better the
    estimate. A subclass gives `ranked`.
    """

    label_smoothing: Smoothing = 0.0

    @property
    def couples_examples(self) -> bool:
        return True

    @property
    def has_pair_losses(self) -> bool:
        return False

    def ranked(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        """Two sets of values [E]: the first one's distribution is to dominate the second one's."""
        raise TypeError(f"{type(self).__name__} ranks nothing")

    def loss(self, pairs: Pairs) -> jax.Array:
        """The loss of each order statistic, [E], laid where examples are: a mean over examples is one over gaps."""
        present = pairs.seen.present
        gaps, places = losses.sorted_gaps(*self.ranked(pairs), present)
        loss = losses.dpo(gaps, pairs.beta, 1.0 - self.label_smoothing)
        nth_present = jnp.cumsum(present) - 1
        return jnp.where(present, jnp.where(places, loss, 0.0)[nth_present], 0.0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AOT(OrderStatistics):
    """Paired AOT: the margins' distribution of the policy is to dominate the reference's."""

    name: Literal["aot"] = "aot"

    def ranked(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        c = pairs.seen
        return c.logps[:, 0] - c.logps[:, 1], c.reference_logps[:, 0] - c.reference_logps[:, 1]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AOTUnpaired(OrderStatistics):
    """Unpaired AOT: chosen rewards, as a distribution, are to dominate rejected ones, whichever they belong to."""

    name: Literal["aot_unpaired"] = "aot_unpaired"

    def ranked(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        return pairs.chosen, pairs.rejected


# Written out, for type checkers read it: what `objective.name` may be of the above.
PairWithReference = (
    DPO
    | DPONorm
    | Hinge
    | IPO
    | Robust
    | EXO
    | DiscoPOP
    | RDPO
    | DPOP
    | NCA
    | SPPO
    | APOZero
    | APODown
    | BCOPair
    | AOT
    | AOTUnpaired
)
