import dataclasses
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpo.models.attention import packed_attention
from jaxpo.models.decoder import Decoder, abstract_decoder, logical_axes, map_params
from jaxpo.models.scratch import Scratch

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]


class Row(NamedTuple):
    tokens: np.ndarray
    segments: np.ndarray
    branches: np.ndarray
    positions: np.ndarray


def pack(examples: list[tuple[list[int], list[list[int]]]], padding: int = 0) -> Row:
    """A row of examples, each a prompt and its completions, then padding."""
    places: list[tuple[int, int, int, int]] = []
    for segment, (prompt, completions) in enumerate(examples, 1):
        places += [(token, segment, 0, i) for i, token in enumerate(prompt)]
        for branch, completion in enumerate(completions, 1):
            places += [(token, segment, branch, len(prompt) + i) for i, token in enumerate(completion)]
    places += [(0, 0, 0, 0)] * padding
    return Row(*(np.array(column)[None] for column in zip(*places, strict=True)))


def hidden(decoder: Decoder, row: Row, remat: str = "none", dtype: str = "float32") -> jax.Array:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        segments, branches, positions = (jnp.asarray(a) for a in row[1:])
        return packed_attention(q, k, v, segments, branches, positions, decoder.config.window)

    tokens, positions = jnp.asarray(row.tokens), jnp.asarray(row.positions)
    return decoder.hidden(tokens, positions, attend, compute_dtype=dtype, remat=remat)[0]  # type: ignore[arg-type]


A = ([5, 6, 7, 8, 9, 10, 11], [[12, 13, 14, 15], [16, 17]])
B = ([20, 21, 22], [[23, 24, 25, 26, 27], [28], [29, 30]])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hidden_states_do_not_depend_on_packing(model: Callable[..., Scratch], model_type: str) -> None:
    decoder = model(model_type).decoder
    row = pack([A, B], padding=5)
    together = np.asarray(hidden(decoder, row))[0]
    assert np.all(np.isfinite(together))
    start = 0
    for prompt, completions in (A, B):
        at = start + len(prompt)
        for completion in completions:
            alone = np.asarray(hidden(decoder, pack([(prompt, [completion])])))[0]
            np.testing.assert_allclose(
                together[start : start + len(prompt)], alone[: len(prompt)], rtol=1e-5, atol=1e-5
            )
            np.testing.assert_allclose(together[at : at + len(completion)], alone[len(prompt) :], rtol=1e-5, atol=1e-5)
            at += len(completion)
        start = at


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
def test_another_example_sibling_or_padding_changes_nothing(model: Callable[..., Scratch], model_type: str) -> None:
    decoder = model(model_type).decoder
    row = pack([A, B], padding=5)
    before = np.asarray(hidden(decoder, row))
    segments, branches = row.segments[0], row.branches[0]
    for place in range(row.tokens.shape[1]):
        changed = row.tokens.copy()
        changed[0, place] = 99
        after = np.asarray(hidden(decoder, row._replace(tokens=changed)))
        reads = (segments == segments[place]) & (np.arange(len(segments)) >= place)
        if branches[place]:
            reads &= branches == branches[place]
        np.testing.assert_array_equal(before[0, ~reads], after[0, ~reads])
        assert np.any(before[0, place] != after[0, place])


def test_no_gradient_reaches_another_example_a_sibling_or_padding(model: Callable[..., Scratch]) -> None:
    decoder = model(tie_word_embeddings=False).decoder
    row = pack([A, B], padding=5)
    sibling = (row.segments == 1) & (row.branches == 1)

    def loss(decoder: Decoder) -> jax.Array:
        return jnp.sum(jnp.sin(hidden(decoder, row)) * jnp.asarray(sibling)[..., None])

    gradient = jax.grad(loss)(decoder).embedding[...]
    touched = set(np.flatnonzero(np.any(np.asarray(gradient) != 0, axis=-1)).tolist())
    assert touched == {*A[0], *A[1][0]}


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_not_gradients(model: Callable[..., Scratch], remat: str) -> None:
    decoder = model(num_hidden_layers=3).decoder
    row = pack([A, B])

    def gradient(remat: str) -> Decoder:
        return jax.jit(jax.grad(lambda d: jnp.sum(jnp.sin(hidden(d, row, remat)))))(decoder)

    def kept(remat: str) -> int:
        _, pull = jax.vjp(lambda d: hidden(d, row, remat), decoder)
        return sum(np.size(leaf) for leaf in jax.tree.leaves(pull))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient("none"), gradient(remat))
    assert kept("full") < kept("dots") < kept("none")
    assert kept(remat) < kept("none")


def test_weights_are_cast_to_the_compute_dtype_and_logits_are_float32(model: Callable[..., Scratch]) -> None:
    decoder = model().decoder
    row = pack([A])
    states = hidden(decoder, row, dtype="bfloat16")
    assert states.dtype == jnp.bfloat16
    assert decoder.logits(states).dtype == jnp.float32
    np.testing.assert_allclose(states.astype(jnp.float32), hidden(decoder, row), rtol=0.1, atol=0.15)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logical_axes_name_every_axis(model: Callable[..., Scratch], model_type: str) -> None:
    config = model(model_type).config
    axes = dict[str, tuple[str | None, ...]]()
    map_params(axes.setdefault, logical_axes(config))  # tuples are flattened: only the structure is looked at
    abstract = abstract_decoder(config, jnp.float32)
    leaves = jax.tree.leaves(logical_axes(config), is_leaf=lambda x: isinstance(x, tuple))
    sizes = {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.width,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "mlp": config.mlp_width,
    }
    for names, leaf in zip(leaves, jax.tree.leaves(abstract), strict=True):
        assert len(names) == leaf.ndim
        assert all(sizes[name] == size for name, size in zip(names, leaf.shape, strict=True) if name)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
def test_sharded_over_a_mesh_it_computes_the_same(model: Callable[..., Scratch], model_type: str) -> None:
    decoder = model(model_type).decoder
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)
    rules = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    axes = jax.tree.leaves(logical_axes(decoder.config), is_leaf=lambda x: isinstance(x, tuple))
    leaves, tree = jax.tree.flatten(decoder)
    placed = tree.unflatten(
        [
            jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*(rules.get(name or "") for name in names))))
            for leaf, names in zip(leaves, axes, strict=True)
        ]
    )
    rows = Row(*(np.tile(a, (4, 1)) for a in pack([A, B], padding=3)))
    sharded = jax.jit(hidden)(placed, jax.device_put(rows, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))))
    np.testing.assert_allclose(sharded, hidden(decoder, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_configuration_is_static_and_goes_to_json(model: Callable[..., Scratch], model_type: str) -> None:
    decoder = model(model_type).decoder
    assert json.loads(json.dumps(dataclasses.asdict(decoder.config)))["width"] == 32
    traces = []

    @jax.jit
    def embed(decoder: Decoder) -> jax.Array:
        traces.append(decoder.config)
        return decoder.head_matrix()

    embed(decoder)
    embed(jax.tree.map(lambda leaf: leaf * 2, decoder))
    assert traces == [decoder.config]
