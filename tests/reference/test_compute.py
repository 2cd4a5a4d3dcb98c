"""The values of the reference table: against log-softmax of one sequence at a time, and in the first loss."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import config_file, run
from jaxpo.batch import DeviceBatch, Example, HostBatch
from jaxpo.data.pack import Packing
from jaxpo.data.tokenizer import load_tokenizer
from jaxpo.models.attention import Context, packed_attention
from jaxpo.models.decoder import Decoder
from jaxpo.models.export import export
from jaxpo.models.scratch import build
from jaxpo.objectives.logprobs import Blocks
from jaxpo.objectives.score import Scorer
from jaxpo.reference.compute import completion_logps

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24},
    "qwen2": {**SIZES, "num_key_value_heads": 2},
    "qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 256},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_the_first_step_is_ln_2(family: str, tiny: Path, tmp_path: Path):
    tokenizer = load_tokenizer(str(tiny / "llama"))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    architecture = {"model_type": family, "initializer_range": 0.1, **FAMILIES[family]}
    new = build(architecture, len(tokenizer), special, jax.random.key(0))
    export(new.decoder, new.hf_config, tmp_path / "model", tokenizer=tokenizer)

    changes = {
        "output_dir": tmp_path / "run",
        "reference.cache_dir": tmp_path / "reference",
        "model.path": tmp_path / "model",
        "data.eval": "[]",
        "training.eval_every": "null",
        "training.max_steps": "2",
    }
    run.train(config_file.load(tiny / "dpo.yaml", [f"{key}={value}" for key, value in changes.items()]))

    first, second = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reference"] == {"computed": 160, "reused": 0}
    assert first["step"] == 1
    assert abs(first["loss"] - math.log(2)) < 1e-5
    assert abs(first["rewards/margins"]) < 1e-5
    # The weights are trained: it is not the table that follows them.
    assert abs(second["loss"] - math.log(2)) > 1e-3


EXAMPLES = [
    Example("a", np.array([5, 6, 7, 8], np.int32), (np.array([9, 10], np.int32), np.array([11], np.int32))),
    Example("b", np.array([3], np.int32), (np.array([4, 4, 4, 4, 4], np.int32), np.array([2, 1], np.int32))),
    Example("c", np.arange(20, 32, dtype=np.int32), (np.array([40], np.int32), np.arange(41, 52, dtype=np.int32))),
    Example("d", np.array([5, 6, 7, 8], np.int32), (np.array([11], np.int32), np.array([9, 10], np.int32))),
]
SCORER = Scorer(compute_dtype="float32", remat="none", blocks=Blocks((16,)))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    architecture = {"model_type": "llama", "initializer_range": 0.3, **FAMILIES["llama"]}
    return build(architecture, 61, {}, jax.random.key(1)).decoder


@jax.jit
def token_logps(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """Log-probs [T - 1] of tokens [T], each given those before it: logits and log-softmax whole."""
    positions = jnp.arange(tokens.shape[0])[None]
    ones = jnp.ones_like(positions)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, Context(ones, 0 * ones, positions), None)

    hidden, _ = decoder.hidden(tokens[None], positions, attend)
    logps = jax.nn.log_softmax(decoder.logits(hidden)[0, :-1])
    return jnp.take_along_axis(logps, tokens[1:, None], axis=1)[:, 0]


def logp(decoder: Decoder, prompt: np.ndarray, completion: np.ndarray) -> float:
    """The log-prob of one completion in a row that holds nothing else; what comes after it is cut off."""
    P, C = len(prompt), len(completion)
    row = np.zeros(32, np.int32)
    row[: P + C] = np.concatenate([prompt, completion])
    return float(token_logps(decoder, jnp.asarray(row))[P - 1 : P + C - 1].sum())


def on_device(batch: HostBatch) -> DeviceBatch:
    return DeviceBatch(*map(jnp.asarray, batch))


@pytest.mark.parametrize(
    "packing",
    [Packing(row_length=64, rows=1), Packing(row_length=32, rows=2), Packing(64, 2, packed=False, share_prompt=False)],
)
def test_values_are_those_of_each_completion_alone_in_order(packing: Packing, decoder: Decoder):
    compute = completion_logps(decoder, EXAMPLES, SCORER, packing, on_device)
    expected = [[[logp(decoder, e.prompt, c) for c in e.completions]] for e in EXAMPLES]
    np.testing.assert_allclose(compute(range(4)), expected, rtol=1e-5)
    np.testing.assert_allclose(compute(range(1, 3)), expected[1:3], rtol=1e-5)


def test_the_second_statistic_is_of_as_many_tokens_as_the_shorter_completion_has(decoder: Decoder):
    scorer = replace(SCORER, statistics=frozenset({"shared"}))
    found = completion_logps(decoder, EXAMPLES, scorer, Packing(row_length=32, rows=2), on_device)(range(4))
    for example, (whole, shared) in zip(EXAMPLES, found, strict=True):
        n = min(map(len, example.completions))
        np.testing.assert_allclose(whole, [logp(decoder, example.prompt, c) for c in example.completions], rtol=1e-5)
        np.testing.assert_allclose(
            shared, [logp(decoder, example.prompt, c[:n]) for c in example.completions], rtol=1e-5
        )


def test_lists_of_fewer_answers_have_zeros_in_their_place(decoder: Decoder):
    nothing = np.zeros(0, np.int32)
    lists = [replace(example, completions=(*example.completions, nothing)) for example in EXAMPLES]
    wanted = completion_logps(decoder, EXAMPLES, SCORER, Packing(64, 1), on_device)(range(4))
    found = completion_logps(decoder, lists, SCORER, Packing(64, 1), on_device)(range(4))
    np.testing.assert_allclose(found[..., :2], wanted, rtol=1e-5)
    assert not np.any(found[..., 2])


def test_the_decoder_is_not_changed_or_donated(decoder: Decoder):
    before = jax.device_get(decoder)
    compute = completion_logps(decoder, EXAMPLES, SCORER, Packing(row_length=64, rows=1), on_device)
    first = compute(range(4))
    np.testing.assert_array_equal(first, compute(range(4)))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(decoder))
