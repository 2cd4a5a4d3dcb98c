"""The count of a step's useful arithmetic against the products that a program really does."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr

from jaxpo.batch import Example
from jaxpo.config import MeshConfig
from jaxpo.data.pack import Packing, pack
from jaxpo.models.attention import Context
from jaxpo.models.attention.context import visible
from jaxpo.models.decoder import Decoder
from jaxpo.training.flops import step_flops
from jaxpo.training.mesh import Layout, make_mesh


def products(jaxpr: Any) -> int:
    """Multiplications and additions in the matrix products of a jaxpr, a scan's body as often as it runs."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            size = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            count += 2 * int(size) * equation.outvars[0].aval.size
        inner = [value for value in equation.params.values() if isinstance(value, ClosedJaxpr)]
        count += equation.params.get("length", 1) * sum(products(one.jaxpr) for one in inner)
    return count


def batch(*lengths: tuple[int, ...], **packing: Any):
    examples = [
        Example(str(i), np.ones(P, np.int32), tuple(np.ones(C, np.int32) for C in completions))
        for i, (P, *completions) in enumerate(lengths)
    ]
    return pack(examples, None, Packing(**{"row_length": 64, "rows": 2, **packing}))[0]


def test_projections_and_head_are_what_a_forward_pass_does(small_decoder: Decoder) -> None:
    """Of one example without padding: everything but attention, a third of the step's."""
    one = batch((3, 4, 5), row_length=12, rows=1)
    c = small_decoder.config

    def forward(decoder: Decoder) -> tuple[jax.Array, jax.Array]:
        hidden, _ = decoder.hidden(one.tokens[0], one.positions[0], lambda q, k, v: q)
        return hidden, hidden[0, :9] @ decoder.head_matrix().T

    done = products(jax.make_jaxpr(forward)(small_decoder).jaxpr)
    attention = 4 * sum([1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8]) * c.num_heads * c.head_dim * c.num_layers
    assert step_flops(c, one) == 3 * (done + attention)


@pytest.mark.parametrize("window", [None, 5])
def test_keys_are_those_that_attention_may_see(small_decoder: Decoder, window: int | None) -> None:
    packed = batch((3, 4, 5), (9, 1, 30), (2, 17, 8), (20, 3, 3))
    config = replace(small_decoder.config, window=window)
    T = jnp.arange(packed.tokens.shape[-1])
    seen = 0
    rows = (np.reshape(f, (-1, len(T))) for f in (packed.segments, packed.branches, packed.positions))
    for fields in zip(*rows, strict=True):
        row = Context(*map(jnp.asarray, fields))
        seen += int((visible(row, T, row, T, window) & (row.segments > 0)[:, None]).sum())
    blind = replace(config, num_layers=0)
    per_key = 3 * 4 * config.num_heads * config.head_dim * config.num_layers
    projections = step_flops(replace(config, window=1), packed) - per_key * int(np.count_nonzero(packed.segments))
    assert step_flops(config, packed) - projections == per_key * seen
    assert step_flops(blind, packed) == 3 * 2 * (4 + 5 + 1 + 30 + 17 + 8 + 3 + 3) * config.width * config.vocab_size


def test_padding_and_layout_cost_nothing(small_decoder: Decoder) -> None:
    lengths = [(3, 4, 5), (9, 1, 30), (2, 17, 8)]
    counts = {
        step_flops(small_decoder.config, batch(*lengths, **how)) for how in ({}, {"row_length": 200}, {"packed": False})
    }
    assert len(counts) == 1


def test_a_reward_model_has_no_vocabulary_to_meet(small_decoder: Decoder) -> None:
    one, scored = batch((3, 4, 5)), replace(small_decoder.config, head="score")
    head = 3 * 2 * 9 * scored.width * scored.vocab_size
    assert step_flops(small_decoder.config, one) - step_flops(scored, one) == head


def test_peak_of_all_devices_or_none() -> None:
    layout = Layout(make_mesh(MeshConfig()))
    assert layout.peak_flops is None, "a CPU's peak is in no table"
