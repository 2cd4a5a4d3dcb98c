"""Held-out metrics of a decoder."""

from collections.abc import Callable

import numpy as np

from jaxpo import console
from jaxpo.batch import DeviceBatch, HostBatch
from jaxpo.data.loader import Corpus, in_order
from jaxpo.data.pack import Packing
from jaxpo.models.decoder import Decoder
from jaxpo.training.metrics import Record, means, total
from jaxpo.training.step import Metrics

PREFIX = "eval_"


def make_evaluation(
    corpus: Corpus,
    reference_logps: np.ndarray | None,
    packing: Packing,
    batch_size: int,
    step: Callable[[Decoder, DeviceBatch], Metrics],
    put: Callable[[HostBatch], DeviceBatch],
) -> Callable[[Decoder], Record]:
    """A function from a decoder to the objective's metrics over the whole corpus, each named `eval_…`."""

    def evaluate(decoder: Decoder) -> Record:
        parts = []
        with console.progress("evaluating", len(corpus), "example") as bar:
            for examples, batch in in_order(corpus, reference_logps, packing, batch_size):
                parts.append(step(decoder, put(batch)))
                bar.advance(len(examples))
        return means(total(parts), PREFIX)

    return evaluate
