"""What objectives have in common: strict fields, and the plain answers to what `batch.Objective` asks."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from pydantic import ConfigDict

from jaxpo.batch import Carry, Feedback, Metrics, Statistic

STRICT = ConfigDict(extra="forbid", strict=True)


def in_order(better: jax.Array, worse: jax.Array) -> jax.Array:
    """1 where what should be the larger one is, 0 where it is the smaller one, and one half for a tie."""
    return 0.5 * (1.0 + jnp.sign(better - worse))


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
