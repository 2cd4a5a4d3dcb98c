import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpo.models.attention import Context, packed_attention
from jaxpo.models.decoder import Decoder, Head, Remat, abstract_decoder, logical_axes
from jaxpo.models.scratch import Scratch

REMATS: tuple[Remat, ...] = ("none", "full", "dots", "attention", "offload")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]


class Row(NamedTuple):
    tokens: np.ndarray
    segments: np.ndarray
    branches: np.ndarray
    positions: np.ndarray


def pack(examples: list[tuple[list[int], list[list[int]]]], length: int = 32) -> Row:
    """A row of examples, each a prompt and its completions, padded to `length` (one length, one compilation)."""
    places: list[tuple[int, int, int, int]] = []
    for segment, (prompt, completions) in enumerate(examples, 1):
        places += [(token, segment, 0, i) for i, token in enumerate(prompt)]
        for branch, completion in enumerate(completions, 1):
            places += [(token, segment, branch, len(prompt) + i) for i, token in enumerate(completion)]
    places += [(0, 0, 0, 0)] * (length - len(places))
    return Row(*(np.array(column)[None] for column in zip(*places, strict=True)))


@partial(jax.jit, static_argnums=(2, 3))
def hidden(decoder: Decoder, row: Row, remat: Remat = "none", dtype: str = "float32") -> jax.Array:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        segments, branches, positions = (jnp.asarray(a) for a in row[1:])
        return packed_attention(q, k, v, Context(segments, branches, positions), decoder.config.window)

    tokens, positions = jnp.asarray(row.tokens), jnp.asarray(row.positions)
    return decoder.hidden(tokens, positions, attend, compute_dtype=dtype, remat=remat)[0]


A = ([5, 6, 7, 8, 9, 10, 11], [[12, 13, 14, 15], [16, 17]])
B = ([20, 21, 22], [[23, 24, 25, 26, 27], [28], [29, 30]])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hidden_states_do_not_depend_on_packing(model: Callable[..., Scratch], model_type: str) -> None:
    decoder = model(model_type).decoder
    row = pack([A, B])
    together = np.asarray(hidden(decoder, row))[0]
    assert np.all(np.isfinite(together))
    start = 0
    for prompt, completions in (A, B):
        P, at = len(prompt), start + len(prompt)
        for completion in completions:
            C = len(completion)
            alone = np.asarray(hidden(decoder, pack([(prompt, [completion])])))[0]
            np.testing.assert_allclose(together[start : start + P], alone[:P], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(together[at : at + C], alone[P : P + C], rtol=1e-5, atol=1e-5)
            at += C
        start = at


def test_padding_changes_no_hidden_state(model: Callable[..., Scratch]) -> None:
    decoder = model("mistral").decoder
    tight, padded = hidden(decoder, pack([A], length=13)), hidden(decoder, pack([A]))
    np.testing.assert_allclose(tight[0], padded[0, :13], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
def test_another_example_sibling_or_padding_changes_nothing(model: Callable[..., Scratch], model_type: str) -> None:
    decoder = model(model_type).decoder
    row = pack([A, B])
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
    row = pack([A, B])
    sibling = (row.segments == 1) & (row.branches == 1)

    def loss(decoder: Decoder) -> jax.Array:
        return jnp.sum(jnp.sin(hidden(decoder, row)) * jnp.asarray(sibling)[..., None])

    gradient = jax.jit(jax.grad(loss))(decoder).embedding[...]
    touched = set(np.flatnonzero(np.any(np.asarray(gradient) != 0, axis=-1)).tolist())
    assert touched == {*A[0], *A[1][0]}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_remat_changes_memory_not_gradients(model: Callable[..., Scratch], dtype: str, tolerance: float) -> None:
    decoder = model(num_hidden_layers=3).decoder
    row = pack([A, B])

    def loss(decoder: Decoder, remat: Remat) -> jax.Array:
        return jnp.sum(jnp.sin(hidden(decoder, row, remat, dtype).astype(jnp.float32)))

    def kept(remat: Remat) -> int:
        pull = jax.eval_shape(lambda d: jax.vjp(lambda d: hidden(d, row, remat, dtype), d)[1], decoder)
        return sum(np.size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    expected, *others = (jax.jit(jax.grad(partial(loss, remat=remat)))(decoder) for remat in REMATS)
    for gradient in others:
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(gradient), strict=True):
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)
    assert kept("full") < kept("attention") < kept("dots") < kept("none")
    assert kept("offload") == kept("attention")


def test_offloading_keeps_nothing_on_the_device_but_the_layers_inputs(model: Callable[..., Scratch]) -> None:
    decoder = model(num_hidden_layers=3).decoder
    row = pack([A, B])
    pull = jax.eval_shape(lambda d: jax.vjp(lambda d: hidden(d, row, "offload"), d)[1], decoder)
    program = str(jax.make_jaxpr(lambda d: jax.vjp(lambda d: hidden(d, row, "offload"), d)[1])(decoder))
    assert jax.tree.leaves(pull)
    assert "pinned_host" in program or "<host>" in program


@pytest.mark.parametrize("unroll", [2, 3])
def test_unrolled_layers_are_the_same_layers(model: Callable[..., Scratch], unroll: int) -> None:
    decoder = model(num_hidden_layers=3).decoder
    row = pack([A, B])

    def loss(decoder: Decoder, unroll: int) -> jax.Array:
        attend = partial(packed_attention, context=Context(*map(jnp.asarray, row[1:])))
        states, _ = decoder.hidden(jnp.asarray(row.tokens), jnp.asarray(row.positions), attend, unroll=unroll)
        return jnp.sum(jnp.sin(states))

    expected, found = (jax.jit(jax.grad(partial(loss, unroll=n)))(decoder) for n in (1, unroll))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, found)


def test_weights_are_cast_to_the_compute_dtype_and_logits_are_float32(model: Callable[..., Scratch]) -> None:
    decoder = model().decoder
    row = pack([A])
    states = hidden(decoder, row, dtype="bfloat16")
    assert states.dtype == jnp.bfloat16
    assert decoder.logits(states).dtype == jnp.float32
    np.testing.assert_allclose(states.astype(jnp.float32), hidden(decoder, row), rtol=0.1, atol=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rewards_are_summed_in_float32_with_the_head_as_it_is(model: Callable[..., Scratch], dtype: str) -> None:
    config = dataclasses.replace(model().config, head="score", width=4096)
    decoder = Decoder(config, jax.random.key(0), jnp.float32)
    assert decoder.head is None
    assert decoder.score is not None
    states = jax.random.normal(jax.random.key(1), (2, 3, 4096), jnp.float32).astype(dtype)
    rewards = decoder.rewards(states)
    assert (rewards.shape, rewards.dtype) == ((2, 3), jnp.float32)
    exact = np.asarray(states, np.float64) @ np.asarray(decoder.score[...], np.float64)[0]
    np.testing.assert_allclose(rewards, exact, rtol=1e-5, atol=1e-5)


def test_a_decoder_has_one_kind_of_head(model: Callable[..., Scratch]) -> None:
    language = model().decoder
    scoring = Decoder(dataclasses.replace(language.config, head="score"), jax.random.key(0), jnp.float32)
    with pytest.raises(ValueError, match="gives logits, no rewards"):
        language.rewards(jnp.zeros(32))
    with pytest.raises(ValueError, match="gives rewards, no logits"):
        scoring.logits(jnp.zeros(32))


@pytest.mark.parametrize("head", ["own", "score"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logical_axes_name_every_axis(model: Callable[..., Scratch], model_type: str, head: Head) -> None:
    config = dataclasses.replace(model(model_type).config, head=head)
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
    rows = Row(*(np.tile(a, (4, 1)) for a in pack([A, B])))
    sharded = hidden(placed, jax.device_put(rows, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))))
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
