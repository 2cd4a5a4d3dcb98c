from typing import Any

import jax
import numpy as np
import pytest

from jaxpo.errors import UserError
from jaxpo.models.scratch import build, configure

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_weights_are_drawn_as_transformers_draws_them() -> None:
    hf_config, config, decoder = build({**ARCHITECTURE, "initializer_range": 0.03}, 500, SPECIAL, jax.random.key(0))
    assert (hf_config["vocab_size"], hf_config["eos_token_id"], config.vocab_size) == (500, 2, 500)
    assert hf_config["architectures"] == ["LlamaForCausalLM"]
    np.testing.assert_allclose(np.std(decoder.embedding[...]), 0.03, rtol=0.05)
    assert decoder.head is not None
    np.testing.assert_allclose(np.std(decoder.head[...]), 0.03, rtol=0.05)
    kernel = np.asarray(decoder.blocks.mlp.down.kernel[...])
    assert kernel.shape == (4, 128, 64)
    np.testing.assert_allclose(np.std(kernel, axis=(1, 2)), 0.03, rtol=0.05)
    assert np.all(np.asarray(decoder.blocks.attention_norm.scale[...]) == 1)
    assert np.any(kernel[0] != kernel[1])


def test_gpt2_draws_what_writes_to_the_residual_stream_smaller() -> None:
    architecture = {"model_type": "gpt2", "n_embd": 64, "n_layer": 8, "n_head": 4, "n_positions": 32}
    decoder = build(architecture, 100, SPECIAL, jax.random.key(0)).decoder
    np.testing.assert_allclose(np.std(decoder.blocks.attention.out.kernel[...]), 0.02 / 4, rtol=0.05)
    np.testing.assert_allclose(np.std(decoder.blocks.attention.query.kernel[...]), 0.02, rtol=0.05)


def test_placed_weights_are_the_same() -> None:
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None))
    key = jax.random.key(0)
    here = build(ARCHITECTURE, 100, SPECIAL, key).decoder
    there = build(ARCHITECTURE, 100, SPECIAL, key, place=lambda _, abstract: jax.tree.map(lambda _: sharding, abstract))
    assert jax.tree.leaves(there.decoder)[0].sharding == sharding
    jax.tree.map(np.testing.assert_array_equal, here, there.decoder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hiden_size": 8}, "hiden_size, which no llama configuration has; did you mean hidden_size?"),
        ({"vocab_size": 8}, "vocab_size; it comes from the tokenizer"),
        ({"eos_token_id": 8}, "eos_token_id; it comes from the tokenizer"),
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"num_key_value_heads": 3}, "4 attention heads and 3"),
    ],
)
def test_a_wrong_architecture_is_told(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        configure({**ARCHITECTURE, **values}, 100, SPECIAL)
    assert str(raised.value).startswith("model.scratch.architecture: ")
    assert words in str(raised.value)
