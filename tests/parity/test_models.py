"""Every family against transformers in float32: logits, rewards, exports, greedy answers; log-probs of real models."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.models.attention import Context, packed_attention
from jaxpo.models.checkpoint import read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.decoder import Decoder
from jaxpo.models.export import export
from jaxpo.models.generate import greedy

torch = pytest.importorskip("torch", reason="transformers' models, the oracle, need torch")
transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "llama-multi-head": {"model_type": "llama", **LLAMA, "num_key_value_heads": 4, "head_dim": 16},
    "llama-tied-biases": {
        "model_type": "llama",
        **LLAMA,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama3-rope": {"model_type": "llama", **LLAMA, "rope_parameters": LLAMA3_ROPE},
    "llama-linear-rope": {
        "model_type": "llama",
        **LLAMA,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0},
    },
    "mistral-window": {"model_type": "mistral", **LLAMA, "sliding_window": 7, "head_dim": 16},
    "mistral-full": {"model_type": "mistral", **LLAMA, "sliding_window": None},
    "qwen2-tied": {"model_type": "qwen2", **LLAMA, "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        **LLAMA,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 0,
    },
    "qwen3": {"model_type": "qwen3", **LLAMA, "head_dim": 16},
    "qwen3-tied-biases": {
        "model_type": "qwen3",
        **LLAMA,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 97,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 48,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 40), dtype=np.int32)


# A reward is read at the last token that is not padding.
PAD = 96
LENGTHS = np.array([40, 23])


def disturbed(model: Any) -> Any:
    """The model far from its initialisation, where every bias, norm and rotation shows in what it puts out."""
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * 0.2 + (1.0 if param.ndim == 1 else 0.0))
    return model.eval()


@pytest.fixture(params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A random model of each family as transformers saves it, and its logits of TOKENS."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**ARCHITECTURES[request.param])
    model = disturbed(transformers.AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", torch_logits(model)


@pytest.fixture(params=ARCHITECTURES)
def reward_model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A random reward model of each family as transformers saves it, and its rewards of the beginnings of TOKENS."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**ARCHITECTURES[request.param], num_labels=1, pad_token_id=PAD)
    model = disturbed(transformers.AutoModelForSequenceClassification.from_config(config))
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", torch_rewards(model)


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def torch_rewards(model: Any, side: str = "right") -> np.ndarray:
    """The rewards of the beginnings of TOKENS, padded at a side to one length."""
    ids, mask, positions = np.full(TOKENS.shape, PAD), np.zeros(TOKENS.shape, int), np.zeros(TOKENS.shape, int)
    for row, length in enumerate(LENGTHS):
        span = slice(0, length) if side == "right" else slice(TOKENS.shape[1] - length, None)
        ids[row, span], mask[row, span], positions[row, span] = TOKENS[row, :length] % PAD, 1, np.arange(length)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        given = {name: torch.tensor(array, dtype=torch.long) for name, array in batch.items()}
        return model(**given).logits.float().numpy()[:, 0]


def hidden(decoder: Decoder, tokens_RT: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens_RT.shape[1]), tokens_RT.shape)
    ones = jnp.ones_like(positions)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, Context(ones, 0 * ones, positions), decoder.config.window)

    return decoder.hidden(tokens_RT, positions, attend)[0]


@jax.jit
def logits(decoder: Decoder, tokens_RT: jax.Array) -> jax.Array:
    return decoder.logits(hidden(decoder, tokens_RT))


@jax.jit
def rewards(decoder: Decoder) -> jax.Array:
    """The rewards of the beginnings of TOKENS."""
    return decoder.rewards(hidden(decoder, jnp.asarray(TOKENS % PAD))[jnp.arange(2), LENGTHS - 1])


def test_logits_equal_transformers(checkpoint: tuple[Path, np.ndarray]) -> None:
    folder, expected = checkpoint
    np.testing.assert_allclose(
        logits(load_decoder(read_checkpoint(folder), "float32"), jnp.asarray(TOKENS)), expected, rtol=1e-5, atol=3e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_loads_in_transformers(checkpoint: tuple[Path, np.ndarray], tmp_path: Path, dtype: str) -> None:
    folder, expected = checkpoint
    source = read_checkpoint(folder)
    export(load_decoder(source, jnp.dtype(dtype)), source.hf_config, tmp_path / "export", max_shard_bytes=20_000)
    assert (tmp_path / "export/model.safetensors.index.json").is_file()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True, dtype="auto"
    )
    assert not any(info[kind] for kind in info), info
    assert model.dtype == getattr(torch, dtype)
    original = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    for (name, one), (other_name, other) in zip(model.state_dict().items(), original.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name
    if dtype == "float32":
        np.testing.assert_array_equal(torch_logits(model.eval()), expected)


def test_rewards_equal_transformers(reward_model: tuple[Path, np.ndarray]) -> None:
    folder, expected = reward_model
    assert np.abs(expected).min() > 0.01
    checkpoint = read_checkpoint(folder, head="score")
    assert not checkpoint.has_new_head
    np.testing.assert_allclose(rewards(load_decoder(checkpoint, "float32")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_reward_model_loads_in_transformers(
    reward_model: tuple[Path, np.ndarray], tmp_path: Path, dtype: str
) -> None:
    folder, expected = reward_model
    source = read_checkpoint(folder, head="score")
    decoder = load_decoder(source, dtype)
    export(decoder, source.hf_config, tmp_path / "export", max_shard_bytes=20_000)
    model = loaded_reward_model(tmp_path / "export", dtype)
    original = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=model.dtype)
    for (name, one), (other_name, other) in zip(model.state_dict().items(), original.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name
    if dtype == "float32":
        np.testing.assert_array_equal(torch_rewards(model), expected)
        np.testing.assert_allclose(torch_rewards(model, "left"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_score_head_is_exported(checkpoint: tuple[Path, np.ndarray], tmp_path: Path, dtype: str) -> None:
    """A reward model that starts from a language model loads in transformers and gives the same rewards there."""
    folder, _ = checkpoint
    source = read_checkpoint(folder, head="score")
    decoder = load_decoder(source, dtype, seed=0)
    export(decoder, {**source.hf_config, "pad_token_id": PAD}, tmp_path / "export", dtype=dtype)
    model = loaded_reward_model(tmp_path / "export", dtype).float()
    in_float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), decoder)
    np.testing.assert_allclose(torch_rewards(model), rewards(in_float32), rtol=1e-5, atol=1e-5)


def loaded_reward_model(folder: Path, dtype: str) -> Any:
    """The reward model that transformers loads, with no weight missing and none too many."""
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, dtype="auto"
    )
    assert not any(info[kind] for kind in info), info
    assert (model.dtype, model.config.num_labels, model.config.pad_token_id) == (getattr(torch, dtype), 1, PAD)
    return model.eval()


def test_stories260k_logprobs(shared: Path) -> None:
    folder = shared / "models/stories260k"
    assert_logprobs(folder, tolerance=2e-5)


def test_smollm2_logprobs(smollm2: Path) -> None:
    assert_logprobs(smollm2, tolerance=1e-4)


def assert_logprobs(folder: Path, tolerance: float) -> None:
    decoder = load_decoder(read_checkpoint(folder), "float32")
    for case in json.loads((folder / "reference_logprobs.json").read_text())["cases"]:
        ids = np.asarray(case["ids"])
        logps = np.asarray(jax.nn.log_softmax(logits(decoder, jnp.asarray(ids[None]))))[0]
        picked = np.take_along_axis(logps[:-1], ids[1:, None], -1)[:, 0]
        np.testing.assert_allclose(picked, case["token_logprobs"], rtol=0, atol=tolerance)
        top = np.argsort(-logps[-1])[:5]
        assert top.tolist() == case["last_top5_ids"]


def test_greedy_equals_transformers(shared: Path) -> None:
    folder = shared / "models/stories260k"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = ["Once upon a time, there was", "Lily said", "The dog"]
    prompts = [np.asarray(tokenizer(text)["input_ids"], np.int32) for text in texts]
    answers = greedy(load_decoder(read_checkpoint(folder), "float32"), prompts, 40, {2})
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor(prompt[None], dtype=torch.long)
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        assert answer.tolist() == whole[0, len(prompt) :].tolist()
