from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.errors import UserError
from jaxpo.models import generate
from jaxpo.models.attention import Context, packed_attention
from jaxpo.models.decoder import CachedAttend, Decoder
from jaxpo.models.generate import cached_attention, greedy
from jaxpo.models.scratch import Scratch

PROMPTS = [np.array(prompt, np.int32) for prompt in ([3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13])]
LENGTH = 32


@jax.jit
def next_tokens(decoder: Decoder, tokens_1T: jax.Array) -> jax.Array:
    positions = jnp.arange(LENGTH)[None]
    ones = jnp.ones_like(positions)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, Context(ones, 0 * ones, positions), decoder.config.window)

    return jnp.argmax(decoder.logits(decoder.hidden(tokens_1T, positions, attend)[0])[0], -1)


def uncached(decoder: Decoder, prompt: np.ndarray, count: int) -> list[int]:
    """Greedy tokens by a whole forward pass for each."""
    tokens = prompt.tolist()
    for _ in range(count):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(next_tokens(decoder, padded)[len(tokens) - 1]))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
def test_the_cache_changes_no_token(model: Callable[..., Scratch], model_type: str) -> None:
    decoder = model(model_type, num_hidden_layers=3).decoder if model_type != "gpt2" else model("gpt2").decoder
    answers = greedy(decoder, PROMPTS, 12, frozenset())
    assert [answer.tolist() for answer in answers] == [uncached(decoder, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer.tolist()) for answer in answers}) == 3


def test_an_answer_ends_with_its_end_of_sequence_token(model: Callable[..., Scratch]) -> None:
    decoder = model().decoder
    free = [answer.tolist() for answer in greedy(decoder, PROMPTS, 12, frozenset())]
    eos = {free[0][4], free[1][2]}
    answers = greedy(decoder, PROMPTS, 12, eos)
    for answer, whole in zip(answers, free, strict=True):
        ends = [i for i, token in enumerate(whole) if token in eos]
        assert answer.tolist() == whole[: ends[0] + 1 if ends else None]
    assert len(answers[0]) < 12


def test_batches_of_like_lengths_share_a_program(
    model: Callable[..., Scratch], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = model().decoder
    traced = []

    def counting(positions: jax.Array, window: int | None) -> CachedAttend:
        traced.append(positions.shape)
        return cached_attention(positions, window)

    monkeypatch.setattr(generate, "cached_attention", counting)
    greedy(decoder, PROMPTS, 6, {2})
    once = len(traced)
    greedy(decoder, [np.arange(40, dtype=np.int32), PROMPTS[0], PROMPTS[1]], 6, {7})
    assert len(traced) == once > 0


def test_no_prompts_no_answers(model: Callable[..., Scratch]) -> None:
    assert greedy(model().decoder, [], 5, {2}) == []


def test_more_tokens_than_learned_positions_are_refused(model: Callable[..., Scratch]) -> None:
    with pytest.raises(UserError, match="has 64 positions"):
        greedy(model("gpt2").decoder, PROMPTS, 58, {2})
