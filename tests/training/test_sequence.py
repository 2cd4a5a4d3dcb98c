"""Rows whose tokens are split over devices: how a batch is laid out for it, and what a device then holds and sends."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpo.batch import DeviceBatch, Example, HostBatch
from jaxpo.data.pack import Packing, pack
from jaxpo.models.decoder import Decoder, by_path
from jaxpo.objectives.score import Scorer, Scores, head_blocks, microbatch
from jaxpo.training import sequence
from jaxpo.training.mesh import AXES, Layout


def examples(count: int, longest: int, K: int, shortest: int = 1) -> list[Example]:
    rng = np.random.default_rng(5)

    def ids() -> np.ndarray:
        return rng.integers(1, 96, rng.integers(shortest, longest + 1), dtype=np.int32)

    return [Example(str(n), ids(), tuple(ids() for _ in range(K))) for n in range(count)]


BATCHES = {
    "pairs": pack(examples(12, 9, 2), None, Packing(64, 2))[0],
    "prompts are scored": pack(examples(12, 9, 2), None, Packing(61, 2, score_prompt=True))[0],
    "lists of answers without a prompt to speak of": pack(
        [Example(str(n), e.prompt[:1], e.completions) for n, e in enumerate(examples(9, 6, 5))], None, Packing(40, 1)
    )[0],
    "answers": pack(examples(12, 9, 1), None, Packing(50, 1))[0],
    "one long pair": pack(examples(1, 40, 2, shortest=40), None, Packing(120, 1))[0],
}


def targets(batch: HostBatch, ways: int) -> list[list[tuple[int, ...]]]:
    """For each row what is predicted from which token: slot, which one of its branch, label, and the token's own."""
    rows = []
    for m, r in np.ndindex(batch.tokens.shape[:2]):
        parts = [np.split(field[m, r], ways) for field in batch[:4] + batch[4:8]]
        found = []
        for tokens, positions, segments, branches, at, labels, slots, indices in zip(*parts, strict=True):
            used = slots < batch.lengths[0, 0].size
            # The used ones come first, as the head counts on it.
            assert not np.any(used[np.count_nonzero(used) :])
            for place, label, slot, index in zip(at[used], labels[used], slots[used], indices[used], strict=True):
                token = (tokens[place], positions[place], segments[place], branches[place])
                found.append((int(slot), int(index), int(label), *map(int, token)))
        rows.append(sorted(found))
    return rows


@pytest.mark.parametrize("ways", [2, 3, 4])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_nothing_is_lost_and_each_device_is_complete(batch: HostBatch, ways: int) -> None:
    laid = sequence.laid_out(batch, ways)
    (M, R, T), (X, K) = batch.tokens.shape, batch.ends.shape[2:]
    chunk = laid.tokens.shape[2] // (2 * ways)
    assert chunk == -(-T // (2 * ways))
    for name in ("tokens", "positions", "segments", "branches"):
        chunks = np.split(getattr(laid, name), 2 * ways, axis=2)
        whole: list[Any] = [None] * (2 * ways)
        for device in range(ways):
            first, last = sequence.chunks_of(device, ways)
            whole[first], whole[last] = chunks[2 * device : 2 * device + 2]
        row = np.concatenate(whole, axis=2)
        np.testing.assert_array_equal(row[:, :, :T], getattr(batch, name))
        assert not row[:, :, T:].any()
    assert targets(laid, ways) == targets(batch, 1)
    # Each completion's last token is on one device.
    ends = laid.ends.reshape(M, R, ways, X, K)
    assert np.all(np.count_nonzero(ends >= 0, axis=2) == 1)
    for m, r, x, k in zip(*np.nonzero(batch.lengths[..., 1:]), strict=True):
        device = int(np.flatnonzero(ends[m, r, :, x, k] >= 0)[0])
        tokens = np.split(laid.tokens[m, r], ways)[device]
        positions = np.split(laid.positions[m, r], ways)[device]
        wanted = batch.ends[m, r, x, k]
        assert tokens[ends[m, r, device, x, k]] == batch.tokens[m, r, wanted]
        assert positions[ends[m, r, device, x, k]] == batch.positions[m, r, wanted]
    for name in set(HostBatch._fields) - sequence.SPLIT:
        assert getattr(laid, name) is getattr(batch, name)


def test_shapes_do_not_depend_on_what_is_in_the_rows() -> None:
    """But for rows in which a device has more to predict than tokens, by more than one prompt's end can explain."""
    shapes = {
        tuple(np.shape(field)[1:] for field in sequence.laid_out(pack(few, None, Packing(256, 1))[0], 4))
        for few in (examples(12, 9, 2), examples(11, 10, 2, shortest=6))
    }
    assert len(shapes) == 1
    crowd = [Example(str(n), np.ones(1, np.int32), (np.ones(1, np.int32),) * 7) for n in range(8)]
    laid = sequence.laid_out(pack(crowd, None, Packing(64, 1))[0], 4)
    chunk = 64 // 8
    assert laid.target_slots.shape[2] // 4 == 2 * chunk + 6


def test_chunks_are_dealt_from_both_ends() -> None:
    """So that of one long row every device's tokens see as much as any other's."""
    for ways in (2, 4, 8):
        pairs = [sequence.chunks_of(device, ways) for device in range(ways)]
        assert sorted(chunk for pair in pairs for chunk in pair) == list(range(2 * ways))
        assert {sum(pair) for pair in pairs} == {2 * ways - 1}


def layout(devices: int) -> Layout:
    """So many devices, over which rows are split."""
    mesh = np.array(jax.devices()[:devices]).reshape(1, 1, devices, 1)
    return Layout(Mesh(mesh, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def gradient(decoder: Decoder, batch: HostBatch, at: Layout, row_length: int) -> Any:
    """A compiled program that gives the scores of a microbatch and the gradient of a sum over them; and its inputs."""
    scorer = Scorer(
        "float32",
        "full",
        head_blocks(row_length // at.row_devices, 1, "cpu", at.mesh.size),
        attention="blocked",
        devices=at,
    )

    def scored(decoder: Decoder, batch: DeviceBatch) -> tuple[jax.Array, Scores]:
        scores = scorer(decoder, microbatch(batch, jnp.int32(0)))
        return (scores.logps[..., 1] - 0.5 * scores.logps[..., 2]).sum(), scores

    weights = jax.device_put(decoder, at.decoder(decoder.config, decoder))
    placed = at.put(batch)
    out = jax.tree.map(lambda leaf: leaf.sharding, at.place(decoder.config, jax.eval_shape(lambda: decoder)))
    everywhere = NamedSharding(at.mesh, PartitionSpec())
    program = jax.jit(jax.value_and_grad(scored, has_aux=True), out_shardings=(everywhere, out))
    compiled = program.lower(weights, placed).compile()
    return compiled, weights, placed


def test_a_row_of_16k_tokens_on_four_devices(small_decoder: Decoder) -> None:
    """Equal to one device's, and in near a quarter of its memory for activations.

    Keys and values, of which every device holds one layer's for the whole row at a time, are together half as wide as
    the model, as in many models.
    """
    T = 16_384
    shape = replace(small_decoder.config, width=64, num_kv_heads=2, head_dim=8, mlp_width=192)
    decoder = Decoder(shape, jax.random.key(2), np.float32)
    rng = np.random.default_rng(6)
    prompt, chosen, rejected = (rng.integers(1, 96, size, dtype=np.int32) for size in (6000, 7000, 3384))
    batch, _ = pack([Example("long", prompt, (chosen, rejected))], None, Packing(T, 1))

    def on(devices: int) -> tuple[float, Scores, Decoder, int]:
        compiled, weights, placed = gradient(decoder, batch, layout(devices), T)
        (value, scores), gradients = compiled(weights, placed)
        memory: Any = compiled.memory_analysis()
        return float(value), scores, jax.tree.map(np.asarray, gradients), memory.temp_size_in_bytes

    value, scores, gradients, memory = on(4)
    wanted_value, wanted_scores, wanted_gradients, whole_memory = on(1)
    assert value == pytest.approx(wanted_value, rel=1e-5)
    np.testing.assert_allclose(scores.logps, wanted_scores.logps, rtol=1e-5)
    np.testing.assert_array_equal(scores.correct, wanted_scores.correct)
    wanted = by_path(wanted_gradients)
    for path, found in by_path(gradients).items():
        assert np.linalg.norm(found - wanted[path]) <= 1e-5 * np.linalg.norm(wanted[path]), path
    assert memory < 0.33 * whole_memory
