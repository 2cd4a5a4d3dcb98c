"""What objectives have in common: strict fields, and the plain answers to what `batch.Objective` asks."""

from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from pydantic import ConfigDict, Field

from jaxpo.batch import Carry, Feedback, Metrics, Statistic

STRICT = ConfigDict(extra="forbid", strict=True)

# Hyper-parameters: what lies further out makes float32 overflow, or is lost in it.
Positive = Annotated[float, Field(ge=1e-6, le=1e6)]
NotNegative = Annotated[float, Field(ge=0.0, le=1e6)]


# What float32 leaves of the difference of two equal sums of log-probs that were computed in rows of another layout.
TIE = 1e-5


def in_order(better: jax.Array, worse: jax.Array) -> jax.Array:
    """1 where what should be the larger one is, 0 where it is the smaller one, one half where they differ by rounding.

    Log-probs in bfloat16 differ by more: a policy equal to its reference is at chance there only on average.
    """
    gap = better - worse
    return jnp.where(jnp.abs(gap) <= TIE, 0.5, (gap > 0).astype(jnp.float32))


class Plain:
    """The answers of DPO, for others to change: over pairs, with a reference, each example by itself."""

    feedback: ClassVar[Feedback] = "pair"

    @property
    def num_completions(self) -> int:
        return 2

    @property
    def uses_reference(self) -> bool:
        return True

    @property
    def uses_labels(self) -> bool:
        return False

    @property
    def uses_scores(self) -> bool:
        return False

    @property
    def couples_examples(self) -> bool:
        return False

    @property
    def statistics(self) -> frozenset[Statistic]:
        return frozenset()

    def initial_carry(self) -> dict[str, float]:
        return {}

    def next_carry(self, carry: Carry, metrics: Metrics) -> dict[str, jax.Array]:
        return {}
