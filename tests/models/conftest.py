from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.models.scratch import Scratch, build

SMALL = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 5},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"n_positions": 64, "n_inner": 48},
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4}

Model = Callable[..., Scratch]


@pytest.fixture(scope="session")
def model() -> Model:
    """`model(model_type, dtype="float32", **architecture)`: a small random model of a family, far from degenerate."""

    @cache
    def make(model_type: str = "llama", dtype: str = "float32", **architecture: Any) -> Scratch:
        sizes = GPT2_SIZES if model_type == "gpt2" else SIZES
        whole = {"model_type": model_type, **sizes, **SMALL[model_type], "initializer_range": 0.2, **architecture}
        scratch = build(
            whole, 101, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, jax.random.key(0), dtype=dtype
        )
        noise = np.random.default_rng(0)

        def disturb(leaf: jax.Array) -> jax.Array:
            return jnp.asarray(leaf + 0.1 * noise.standard_normal(leaf.shape, np.float32), dtype)

        return scratch._replace(decoder=jax.tree.map(disturb, scratch.decoder))

    return make
