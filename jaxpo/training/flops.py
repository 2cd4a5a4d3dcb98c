"""The useful arithmetic of a step: what the tokens in its rows cost, whatever padding or recomputation comes on top."""

import numpy as np

from jaxpo.batch import HostBatch
from jaxpo.models.decoder import DecoderConfig

# Dense bfloat16 products of one device, FLOP/s, by jax's name of its kind; published by the vendors.
PEAK = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    # A chip is two devices.
    "TPU7x": 2307e12 / 2,
}


def step_flops(config: DecoderConfig, batch: HostBatch) -> float:
    """Floating-point operations of a train step, a multiplication and an addition counted as two.

    Forward, each token costs 2 for each weight of the layers' matrices and, for each key that it sees, 4 for each
    number in its queries; a scored token costs 2 for each weight of the head. Backward is twice forward. Padding is
    not counted, nor what is computed again; a prompt counts as often as it stands in the rows.
    """
    c = config
    projections = c.width * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    mlp = c.width * c.mlp_width * (3 if c.mlp == "gated" else 2)
    tokens = np.count_nonzero(batch.segments)
    # A token sees its own completion up to itself, and the whole prompt: as many keys as its position says.
    keys = np.where(batch.segments > 0, batch.positions.astype(np.int64) + 1, 0)
    seen = (keys if c.window is None else np.minimum(keys, c.window)).sum()
    scored = int(batch.num_tokens.sum()) if c.head != "score" else 0
    layers = c.num_layers * (2 * tokens * (projections + mlp) + 4 * seen * c.num_heads * c.head_dim)
    return 3.0 * (layers + 2 * scored * c.width * c.vocab_size)
