"""The useful arithmetic of a step: what the tokens in its rows cost, whatever padding or recomputation comes on top."""

from typing import NamedTuple

import numpy as np

from jaxpo.batch import HostBatch
from jaxpo.models.decoder import DecoderConfig
from jaxpo.planning.hardware import BY_KIND

# Dense bfloat16 products of one device, FLOP/s, by jax's name of its kind.
PEAK = {kind: chip.flops for kind, chip in BY_KIND.items()}


class Counts(NamedTuple):
    """What the rows of a batch hold: tokens, the keys that they see, all together, and tokens that meet the head."""

    tokens: float
    seen: float
    scored: float


class Forward(NamedTuple):
    """Floating-point operations of a forward pass: products with the layers' matrices, attention, the head."""

    products: float
    attention: float
    head: float


def counts(config: DecoderConfig, batch: HostBatch) -> Counts:
    """Of a packed batch; padding does not count."""
    # A token sees its own completion up to itself, and the whole prompt: as many keys as its position says.
    keys = np.where(batch.segments > 0, batch.positions.astype(np.int64) + 1, 0)
    seen = (keys if config.window is None else np.minimum(keys, config.window)).sum()
    return Counts(int(np.count_nonzero(batch.segments)), int(seen), int(batch.num_tokens.sum()))


def forward(config: DecoderConfig, of: Counts) -> Forward:
    """A multiplication and an addition are two.

    A token costs 2 for each weight of the layers' matrices and, for each key that it sees, 4 for each number in its
    queries; a scored token costs 2 for each weight of the head.
    """
    c = config
    projections = c.width * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    mlp = c.width * c.mlp_width * (3 if c.mlp == "gated" else 2)
    scored = of.scored if c.head != "score" else 0
    return Forward(
        products=c.num_layers * 2 * of.tokens * (projections + mlp),
        attention=c.num_layers * 4 * of.seen * c.num_heads * c.head_dim,
        head=2 * scored * c.width * c.vocab_size,
    )


def useful(config: DecoderConfig, of: Counts) -> float:
    """Floating-point operations of a train step: backward is twice forward. Nothing that is computed again counts."""
    return 3.0 * sum(forward(config, of))


def step_flops(config: DecoderConfig, batch: HostBatch) -> float:
    """The useful arithmetic of a train step over a packed batch; a prompt counts as often as it stands in the rows."""
    return useful(config, counts(config, batch))
