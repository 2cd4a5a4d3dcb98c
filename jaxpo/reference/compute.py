"""What the reference table holds, computed: packed forward passes over the data, a chunk of examples at a time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo import processes
from jaxpo.batch import DeviceBatch, Example, HostBatch
from jaxpo.data.pack import Packing, pack
from jaxpo.models.decoder import Decoder
from jaxpo.objectives.score import Scorer, all_scores


class Examples(Protocol):
    def __getitem__(self, index: int, /) -> Example: ...


@partial(jax.jit, static_argnums=0)
def score_batch(scorer: Scorer, decoder: Decoder, batch: DeviceBatch) -> jax.Array:
    """The reference's statistics [M, R, X, Q, K] of every completion of a batch: log-prob sums, and shared ones."""
    scores = all_scores(scorer, decoder, batch)
    statistics = [scores.logps, scores.shared] if "shared" in scorer.statistics else [scores.logps]
    return jnp.stack(statistics, axis=-2)[..., 1:]


def completion_logps(
    decoder: Decoder,
    examples: Examples,
    scorer: Scorer,
    packing: Packing,
    put: Callable[[HostBatch], DeviceBatch],
) -> Callable[[Sequence[int]], np.ndarray]:
    """A function from example indices to the reference's statistics of them, [n, Q, K], in the same order.

    `put` moves a batch to the devices that hold the decoder.
    """

    def compute(chunk: Sequence[int]) -> np.ndarray:
        batch, places = pack([examples[i] for i in chunk], None, packing)
        values = processes.whole(score_batch(scorer, decoder, put(batch)))
        return np.stack([values[place] for place in places])

    return compute
