"""The device mesh: how its axes are sized, and where parameters, batches and optimizer states lie on it."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxpo.batch import DeviceBatch, Example
from jaxpo.config import MeshConfig, OptimizerConfig
from jaxpo.data.pack import Packing, pack
from jaxpo.errors import UserError
from jaxpo.models.decoder import Decoder, abstract_decoder, map_params
from jaxpo.training.mesh import AXES, Layout, make_mesh, near_each_other
from jaxpo.training.optimizer import make_optimizer
from jaxpo.training.step import TrainState


def layout(data: int = 1, fsdp: int = -1, tensor: int = 1, sequence: int = 1) -> Layout:
    return Layout(make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, -1, 1, 1), (1, 8, 1, 1)),
        ((2, -1, 1, 2), (2, 2, 1, 2)),
        ((-1, 1, 1, 4), (2, 1, 1, 4)),
        ((1, 2, 1, -1), (1, 2, 1, 4)),
        ((1, 2, -1, 2), (1, 2, 2, 2)),
        ((8, 1, 1, 1), (8, 1, 1, 1)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    mesh = layout(**dict(zip(AXES, sizes, strict=True))).mesh
    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor")
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize("sizes", [(3, -1, 1), (1, 1, 1), (4, 4, 1), (16, -1, 1)])
def test_axes_that_do_not_cover_the_devices_are_an_error(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError) as caught:
        layout(*sizes)
    data, fsdp, tensor = sizes
    assert str(caught.value) == (
        f"mesh is data={data}, fsdp={fsdp}, sequence=1, tensor={tensor}, which cannot cover the 8 cpu device(s) here: "
        "expected axes whose product is 8 (-1 takes the rest)."
    )


def test_slices_of_tpus_have_copies_of_their_own() -> None:
    devices = [SimpleNamespace(platform="tpu", slice_index=n // 4) for n in range(8)]
    with pytest.raises(UserError, match=r"mesh\.data is 1 on 2 slices of TPUs, .* expected a multiple of 2"):
        near_each_other((1, 8, 1, 1), devices)


def test_rows_are_split_over_data_and_fsdp_and_their_tokens_along_the_sequence() -> None:
    at = layout(data=2, fsdp=1, sequence=2, tensor=2)
    assert at.batch_devices == 2
    answer = np.ones(6, np.int32)
    examples = [Example(str(n), answer, (answer, answer)) for n in range(4)]
    batch = at.put(pack(examples, None, Packing(20, 2, devices=2))[0])
    parts = {name: value.addressable_shards[0].data.shape for name, value in batch._asdict().items()}
    assert parts["tokens"] == parts["segments"] == (2, 1, 10)
    # A place for each token, and one more for what a prompt's last token predicts a second time.
    assert parts["target_slots"] == (2, 1, 11)
    assert parts["ends"] == parts["scores"] == (2, 1, 1, 2)
    assert parts["num_examples"] == ()


def specs(at: Layout, config: Any) -> dict[str, PartitionSpec]:
    found: dict[str, PartitionSpec] = {}
    abstract = abstract_decoder(config, jnp.float32)
    map_params(lambda path, sharding: found.update({path: sharding.spec}), at.decoder(config, abstract))
    return found


def test_parameters_follow_the_table(small_decoder: Decoder) -> None:
    P = PartitionSpec
    assert specs(layout(data=2, fsdp=2, tensor=2), small_decoder.config) == {
        "embedding": P("tensor", "fsdp"),
        "blocks.attention_norm.scale": P(None, None),
        "blocks.attention.query.kernel": P(None, "fsdp", "tensor", None),
        "blocks.attention.key.kernel": P(None, "fsdp", "tensor", None),
        "blocks.attention.value.kernel": P(None, "fsdp", "tensor", None),
        "blocks.attention.out.kernel": P(None, "tensor", None, "fsdp"),
        "blocks.mlp_norm.scale": P(None, None),
        "blocks.mlp.gate.kernel": P(None, "fsdp", "tensor"),
        "blocks.mlp.up.kernel": P(None, "fsdp", "tensor"),
        "blocks.mlp.down.kernel": P(None, "tensor", "fsdp"),
        "final_norm.scale": P(None),
    }
    both = layout(data=1, fsdp=2, sequence=2, tensor=2)
    assert both.parameter((96, 32), ("vocab", "embed")).spec == P("tensor", ("fsdp", "sequence"))
    # What does not divide by both divides by the first.
    assert both.parameter((96, 34), ("vocab", "embed")).spec == P("tensor", "fsdp")


def test_an_axis_that_does_not_divide_stays_whole(small_decoder: Decoder) -> None:
    """4 key and value heads on 8 tensor devices; the 8 query heads, 96 tokens and 48 MLP units divide."""
    found = specs(layout(fsdp=1, tensor=8), small_decoder.config)
    assert found["blocks.attention.key.kernel"] == PartitionSpec(None, None, None, None)
    assert found["blocks.attention.query.kernel"] == PartitionSpec(None, None, "tensor", None)
    at = layout(fsdp=1, tensor=8)
    assert at.parameter((97, 32), ("vocab", "embed")).spec == PartitionSpec(None, None)


def test_the_optimizer_lies_where_the_parameters_do(small_decoder: Decoder) -> None:
    at, config = layout(data=2, fsdp=2, tensor=2), small_decoder.config
    decoder = abstract_decoder(config, jnp.float32)
    optimizer = make_optimizer(OptimizerConfig(), config, 10, 1.0)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
    state = TrainState(step, decoder, jax.eval_shape(optimizer.init, decoder), {"kl": scalar})
    placed = at.place(config, state)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    wanted = jax.tree.leaves(at.decoder(config, decoder))
    assert [leaf.sharding for leaf in jax.tree.leaves(placed.decoder)] == wanted
    moments = [leaf for leaf in jax.tree.leaves(placed.optimizer) if leaf.shape]
    assert [leaf.sharding for leaf in moments] == wanted * 2
    counters = [leaf for leaf in jax.tree.leaves(placed.optimizer) if not leaf.shape]
    counters += [placed.step, *placed.carry.values()]
    assert len(counters) == 4
    assert {leaf.sharding for leaf in counters} == {at.replicated}


def test_a_gathered_embedding_is_the_same_and_whole_along_its_width(small_decoder: Decoder) -> None:
    at = layout(data=1, fsdp=4, tensor=2)
    decoder = jax.device_put(small_decoder, at.decoder(small_decoder.config, small_decoder))
    rows: Any = DeviceBatch(*[jnp.zeros((4, 1))] * len(DeviceBatch._fields))

    def embedding(decoder: Decoder, _: DeviceBatch) -> Any:
        return at.whole(decoder).embedding[...]

    gathered: Any = jax.jit(at.over_rows(embedding))(decoder, rows)
    assert {shard.data.shape for shard in gathered.addressable_shards} == {(48, 32)}
    # What each of the four devices of fsdp has, one below the other.
    for of_device in np.split(np.asarray(gathered), 4):
        np.testing.assert_array_equal(of_device, small_decoder.embedding[...])
