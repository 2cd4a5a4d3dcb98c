"""What the reference table holds, computed: packed forward passes over the data, a chunk of examples at a time."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpo.batch import DeviceBatch, Example, HostBatch
from jaxpo.data.pack import Packing, pack
from jaxpo.models.decoder import Decoder
from jaxpo.objectives.score import Scorer, microbatch


class Examples(Protocol):
    def __getitem__(self, index: int, /) -> Example: ...


def score_batch(scorer: Scorer, decoder: Decoder, batch: DeviceBatch) -> jax.Array:
    """Log-prob sums [M, R, X, K] of every completion of a batch."""

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(out, scorer(decoder, microbatch(batch, i)).logps, i, 0)

    return lax.fori_loop(0, batch.num_microbatches, body, jnp.zeros(batch.lengths.shape, jnp.float32))


def completion_logps(
    decoder: Decoder,
    examples: Examples,
    scorer: Scorer,
    packing: Packing,
    put: Callable[[HostBatch], DeviceBatch],
) -> Callable[[range], np.ndarray]:
    """A function from a range of example indices to their log-prob sums [n, K], in the examples' order.

    `put` moves a batch to the devices that hold the decoder.
    """
    score = jax.jit(lambda d, b: score_batch(scorer, d, b))

    def compute(chunk: range) -> np.ndarray:
        batch, places = pack([examples[i] for i in chunk], None, packing)
        logps = np.asarray(score(decoder, put(batch)))
        return np.stack([logps[place] for place in places])

    return compute
