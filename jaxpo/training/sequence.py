"""Rows whose tokens are split over devices: which device has which, and a batch laid out for that, on the host.

A row is cut into twice as many chunks as devices; a device has one from the front and the one as far from the back. So
each has as much to do in attention, where a token of one long example sees all before it (Dubey et al. 2024, arXiv
2407.21783, sec. 3.3.2). What a device scores is what the hidden states of its own chunks predict.
"""

from typing import Any

import numpy as np

from jaxpo.batch import HostBatch
from jaxpo.data.pack import bucket

# What is split along the sequence; the rest of a batch is the same on all devices of a row.
SPLIT = frozenset({
    "tokens",
    "positions",
    "segments",
    "branches",
    "target_positions",
    "target_labels",
    "target_slots",
    "target_indices",
    "ends",
})  # fmt: skip


def chunks_of(device: Any, ways: int) -> tuple[Any, Any]:
    """The two chunks, of 2 * ways, that a device has; an int, or an array [] of it."""
    return device, 2 * ways - 1 - device


def laid_out(batch: HostBatch, ways: int) -> HostBatch:
    """The batch with rows that split evenly over `ways` devices, each part complete in itself.

    Fields [M, R, T] hold the chunks of the first device, then those of the next; rows are filled up to whole chunks.
    Targets become [M, R, ways * S'] and ends [M, R, ways * X, K], with places within the device's own chunks; an end
    that another device has is -1. A device has a place in S' for each of its tokens and what a prompt's last token
    predicts more than one: some for one prompt, and if that is not enough twice, four times … as many.
    """
    M, R, T = batch.tokens.shape
    chunk = -(-T // (2 * ways))
    order = np.array([chunks_of(device, ways) for device in range(ways)]).reshape(-1)
    now = np.empty((2 * ways, chunk), np.int64)
    now[order] = np.arange(2 * ways * chunk).reshape(2 * ways, chunk)
    device_T, place_T = np.divmod(now.reshape(-1), 2 * chunk)

    def in_chunks(field: np.ndarray) -> np.ndarray:
        whole = np.pad(field, ((0, 0), (0, 0), (0, 2 * ways * chunk - T)))
        return whole.reshape(M, R, 2 * ways, chunk)[:, :, order].reshape(M, R, -1)

    X, K = batch.ends.shape[2:]
    none = X * (1 + K)
    m, r, s = np.nonzero(batch.target_slots < none)
    at = batch.target_positions[m, r, s]
    part = (m * R + r) * ways + device_T[at]
    by_part = np.argsort(part, kind="stable")
    counts = np.bincount(part, minlength=M * R * ways)
    rank = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)
    more = max(1, K - 1)
    size = 2 * chunk + more * bucket(-(-int(counts.max() - 2 * chunk) // more))

    def of_devices(values: np.ndarray, empty: int) -> np.ndarray:
        field = np.full((M * R * ways, size), empty, np.int32)
        field[part[by_part], rank] = values[by_part]
        return field.reshape(M, R, ways * size)

    own = device_T[batch.ends][:, :, None] == np.arange(ways)[:, None, None]
    ends = np.where(own, place_T[batch.ends][:, :, None], -1).astype(np.int32)
    return batch._replace(
        tokens=in_chunks(batch.tokens),
        positions=in_chunks(batch.positions),
        segments=in_chunks(batch.segments),
        branches=in_chunks(batch.branches),
        target_positions=of_devices(place_T[at], 0),
        target_labels=of_devices(batch.target_labels[m, r, s], 0),
        target_slots=of_devices(batch.target_slots[m, r, s], none),
        target_indices=of_devices(batch.target_indices[m, r, s], 0),
        ends=ends.reshape(M, R, ways * X, K),
    )
