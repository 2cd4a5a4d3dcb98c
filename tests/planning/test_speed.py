"""The arithmetic of a step against counts made by hand, and the roofline against its parts."""

from dataclasses import replace

import numpy as np
import pytest

from jaxpo.config import DataConfig, DataSource, MeshConfig, ModelConfig, Run, TrainingConfig
from jaxpo.models.families import decoder_config
from jaxpo.objectives import DPO
from jaxpo.objectives.supervised import SFT
from jaxpo.planning.hardware import parse
from jaxpo.planning.speed import device_flops, times, useful_flops
from jaxpo.planning.work import Step, batches_of, parameters

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 50_257}


def step(config: dict[str, object], lengths: tuple[int, ...], batch_size: int, row_length: int) -> Step:
    """Equal examples on one TPU chip."""
    model = decoder_config(config, "a test")
    run = Run(
        model=ModelConfig(path="none"),
        data=DataConfig(train=(DataSource(path="none.jsonl"),)),
        objective=SFT() if len(lengths) == 2 else DPO(),
        training=TrainingConfig(batch_size=batch_size, row_length=row_length),
        mesh=MeshConfig(fsdp=1),
    )
    prompt, *completions = lengths
    batches = batches_of(np.array([prompt]), np.array([completions]), run, model.window, "a test")
    return Step(run, model, batches, "tpu", "splash")


# Forward, twice for each weight that a token meets, and 4 x heads' width for each key that it sees; backward is twice
# forward. Weights of a layer: queries, keys and values, the output, the MLP. Keys: 1 + 2 + … of a prompt, and for each
# token of a completion the whole prompt too.
BY_HAND = {
    # Layer: 576 x (576 + 2 x 192) + 576 x 576 + 3 x 576 x 1536 = 3,538,944; 30 of them: 106,168,320.
    # Tokens 120 + 60 + 60 = 240; keys 120 x 121 / 2 + 2 x (60 x 120 + 60 x 61 / 2) = 7,260 + 2 x 9,030 = 25,320.
    # Head: 120 scored tokens x 49,152 x 576 weights.
    "smollm2": (
        step(SMOLLM2, (120, 60, 60), 4, row_length=960),
        134_515_008,
        4 * 3 * (2 * 240 * 106_168_320 + 30 * 4 * 576 * 25_320 + 2 * 120 * 49_152 * 576),
    ),
    # Layer: 4096 x (4096 + 2 x 1024) + 4096 x 4096 + 3 x 4096 x 14,336 = 218,103,808; 32: 6,979,321,856.
    # Tokens 2,048; keys 1024 x 1025 / 2 + 2 x (512 x 1024 + 512 x 513 / 2) = 524,800 + 2 x 655,616 = 1,836,032.
    "llama 8b": (
        step(LLAMA_8B, (1024, 512, 512), 2, row_length=4096),
        8_030_261_248,
        2 * 3 * (2 * 2048 * 6_979_321_856 + 32 * 4 * 4096 * 1_836_032 + 2 * 1024 * 128_256 * 4096),
    ),
    # Layer: 4 x 768 x 768 + 2 x 768 x 3072 = 7,077,888; 12: 84,934,656. One answer: 300 tokens, keys 300 x 301 / 2.
    "gpt2": (
        step(GPT2, (100, 200), 8, row_length=900),
        124_439_808,
        8 * 3 * (2 * 300 * 84_934_656 + 12 * 4 * 768 * 45_150 + 2 * 200 * 50_257 * 768),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_arithmetic_and_parameters_are_those_counted_by_hand(name: str) -> None:
    found, numbers, flops = BY_HAND[name]
    assert parameters(found.model) == numbers
    assert useful_flops(found) == pytest.approx(flops, rel=1e-12)


def test_what_a_device_computes_more_than_that() -> None:
    """By hand, for a row that is full: the head's logits again, five products of attention's backward pass for four,
    half a tile for each token, and with `full` the forward pass but for its last product.
    """
    found, _, _ = BY_HAND["smollm2"]
    weights, keys = 106_168_320, 4 * (25_320 + 240 * 512 / 2)
    head = 8 * 480 * 49_152 * 576
    plain = found.with_(run=replace(found.run, model=ModelConfig(path="none", remat="none")))
    products = 3 * 2 * 960 * weights
    attention = 3.5 * 30 * 4 * 576 * keys
    assert plain.places == 960
    assert device_flops(plain) == pytest.approx(products + attention + head, rel=0.02)
    again = 2 * 960 * (weights - 30 * 576 * 1536) + attention / 3.5
    assert device_flops(found) == pytest.approx(products + attention + head + again, rel=0.02)


def test_windows_and_unshared_prompts_are_counted() -> None:
    mistral = {**SMOLLM2, "model_type": "mistral", "sliding_window": 50}
    short = step(mistral, (120, 60, 60), 4, row_length=960)
    # 50 x 51 / 2 keys of the first 50 tokens, and 50 for each one more, of the prompt and of both answers.
    assert short.batches.counts.seen == 4 * (1275 + 190 * 50)
    unshared = replace(BY_HAND["smollm2"][0].run.training, share_prompt=False)
    run = replace(BY_HAND["smollm2"][0].run, training=unshared)
    twice = batches_of(np.array([120]), np.array([[60, 60]]), run, None, "a test")
    assert twice.counts.tokens == 4 * 2 * 180
    assert twice.counts.seen == 4 * 2 * 180 * 181 / 2


def test_the_slowest_part_binds() -> None:
    found, _, _ = BY_HAND["llama 8b"]
    eight = replace(found.run, mesh=MeshConfig(data=1, fsdp=8), training=replace(found.run.training, batch_size=16))
    batches = batches_of(np.array([1024]), np.array([[512, 512]]), eight, None, "a test")
    on = times(found.with_(run=eight, batches=batches), parse("v5e:2x4"))
    assert on.total == pytest.approx(max(on[:4]) + on.exposed + on.update)
    assert on.products == pytest.approx(device_flops(found.with_(run=eight, batches=batches)) / 197e12)
    assert on.moments == 0
    # Kernels twice in bfloat16 and embedding and head once in float32, gathered; gradients once in float32: a line of 4
    # and one of 2 links of 50 GB/s, seven eighths of everything.
    sent = 2 * 2 * 6_979_321_856 + 4 * 6_979_321_856 + 2 * 2 * 4 * 128_256 * 4096
    assert on.overlapped == pytest.approx(sent * 7 / 8 / 100e9, rel=1e-3)
