"""Reward models at work: texts in, rewards out; for judging answers, choosing the best of many, and rating data.

Legend (see `jaxpo.batch`): M microbatches, R rows of a microbatch, X example slots of a row, K completions.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxpo import compiler
from jaxpo.batch import DeviceBatch, Example
from jaxpo.config import Dtype, MeshConfig
from jaxpo.data.chat import Encoded, Encoder, Fitted, Limits, Refused, fit, resolve_template
from jaxpo.data.files import Where
from jaxpo.data.pack import Packing, bucket, pack
from jaxpo.data.readers import Preference
from jaxpo.data.record import Said
from jaxpo.data.tokenizer import load_tokenizer
from jaxpo.errors import UserError
from jaxpo.models import attention
from jaxpo.models.checkpoint import read_checkpoint
from jaxpo.models.convert import load_decoder
from jaxpo.models.decoder import Decoder, Learned, abstract_decoder
from jaxpo.objectives.logprobs import Blocks
from jaxpo.objectives.score import Scorer, all_scores
from jaxpo.training.mesh import Layout, make_mesh

# Examples that are packed, and go to the devices, at once.
CHUNK = 256


class Share(NamedTuple):
    """Completions of one text that lie in one example: the text's number, and which of its completions."""

    text: int
    answers: range


@dataclass(frozen=True)
class RewardModel:
    """A reward model on its devices, with the tokenizer and the chat template of its checkpoint.

    pad_id: the token that transformers looks for the end of a text before, or None. max_length: tokens of a prompt with
    one completion; completions are cut to it, as in training, or if None nowhere. row_length: tokens of a packed row at
    most, unless a text is longer; it changes speed and memory, never a reward.
    """

    decoder: Decoder
    encoder: Encoder
    scorer: Scorer
    layout: Layout
    pad_id: int | None
    max_length: int | None
    row_length: int

    @classmethod
    def load(
        cls,
        path: str | Path,
        revision: str | None = None,
        *,
        chat_template: str | None = None,
        compute_dtype: Dtype = "float32",
        max_length: int | None = None,
        row_length: int = 1024,
        mesh: MeshConfig = MeshConfig(),  # noqa: B008 - frozen
    ) -> "RewardModel":
        """The reward model in a folder, jaxpo's own format included, or behind a hub id.

        Its weights stay as they are stored, float32 or bfloat16. chat_template: a file or a built-in name, in place of
        the tokenizer's own. UserError where there is no reward model.
        """
        compiler.set_up(compute_dtype)
        checkpoint = read_checkpoint(path, revision, head="stored")
        config = checkpoint.decoder_config
        if config.head != "score":
            found = ", ".join(map(str, checkpoint.hf_config.get("architectures") or ["no architectures"]))
            raise UserError(
                f"{checkpoint.folder / 'config.json'}: found {found}, a language model, which gives no rewards; "
                "expected a reward model (a …ForSequenceClassification), as objective.name reward exports it."
            )
        tokenizer = load_tokenizer(str(path), revision)
        layout = Layout(make_mesh(mesh))
        dtype = checkpoint.stored_dtype
        return cls(
            decoder=load_decoder(checkpoint, dtype, layout.decoder(config, abstract_decoder(config, dtype))),
            encoder=Encoder(tokenizer, resolve_template(tokenizer, chat_template)),
            scorer=Scorer(
                compute_dtype=compute_dtype,
                remat="none",
                blocks=Blocks((row_length,)),
                statistics=frozenset({"rewards"}),
                attention=attention.choose(layout.platform, compute_dtype, config.head_dim),
                devices=layout,
            ),
            layout=layout,
            pad_id=checkpoint.hf_config.get("pad_token_id"),
            max_length=max_length,
            row_length=row_length,
        )

    def score(self, texts: Sequence[tuple[Said, Sequence[Said]]]) -> np.ndarray:
        """Rewards [N, K] float32 of N prompts with their completions; NaN where one has fewer than K, the most.

        A prompt is plain text, or a list of messages for the chat template. Its completions are plain text, or lists of
        messages; plain text after messages is the assistant's answer. One text alone is a completion of "". UserError
        where one of them cannot be tokenised, or is longer than the model's table of positions.
        """
        rows = [(Where("text ", n), _preference(*text)) for n, text in enumerate(texts, 1)]
        tokenised = self.tokenise(rows)
        for (where, _), one in zip(rows, tokenised, strict=True):
            if isinstance(one, Refused):
                raise UserError(f"{where} has no reward: {one.reason}{f' ({one.detail})' if one.detail else ''}.")
        rewards = self.rewards([one for one in tokenised if isinstance(one, Fitted)])
        table = np.full((len(rewards), max(map(len, rewards), default=0)), np.nan, np.float32)
        for line, found in zip(table, rewards, strict=True):
            line[: len(found)] = found
        return table

    def tokenise(self, rows: Sequence[tuple[Where, Preference]]) -> list[Fitted | Refused]:
        """Token ids of each prompt and its completions, by the code that makes training data."""
        return [
            one if isinstance(one, Refused) else self._fitted(where, one)
            for (where, _), one in zip(rows, self.encoder(rows), strict=True)
        ]

    def rewards(self, texts: Sequence[Fitted]) -> list[np.ndarray]:
        """The rewards, float32 [K], of the completions of each text, in the order of the texts."""
        row_length = self._row_length(texts)
        shares = [share for n, text in enumerate(texts) for share in _shares(n, text, row_length)]
        most = bucket(max((len(share.answers) for share in shares), default=1))
        packing = Packing(row_length, self.layout.batch_devices, devices=self.layout.batch_devices)
        found = [np.zeros(len(text.completions), np.float32) for text in texts]
        # On GPUs and TPUs float32 products would be of fewer bits unless told otherwise.
        precision = "highest" if self.scorer.compute_dtype == "float32" else None
        for chunk in (shares[n : n + CHUNK] for n in range(0, len(shares), CHUNK)):
            batch, places = pack([_example(texts[share.text], share, most) for share in chunk], None, packing)
            # A last chunk that is smaller keeps the shape, so that nothing is compiled for it.
            packing = replace(packing, microbatches=len(batch.tokens))
            with jax.default_matmul_precision(precision):
                values = np.asarray(_score(self.scorer, self.decoder, self.layout.put(batch)))
            for share, place in zip(chunk, places, strict=True):
                found[share.text][share.answers] = values[place][: len(share.answers)]
        return found

    def _row_length(self, texts: Sequence[Fitted]) -> int:
        """Tokens of a row: no more than all texts take, and no less than the longest one with one completion."""
        longest = max((len(t.prompt) + len(c) for t in texts for c in t.completions), default=0)
        total = sum(len(t.prompt) + sum(map(len, t.completions)) for t in texts)
        return max(bucket(longest), min(self.row_length, bucket(total)))

    def _fitted(self, where: Where, encoded: Encoded) -> Fitted | Refused:
        if not all(encoded.completions):
            return Refused("empty_answer", "the chat template renders nothing for an answer")
        most = sys.maxsize if self.max_length is None else self.max_length
        fitted = fit(encoded, Limits(most, None, "left"))
        if not all(fitted.completions):
            return Refused("no_completion_left", f"the prompt alone has {len(fitted.prompt)} tokens")
        # transformers reads the reward before the padding, and takes padding for that wherever it comes from.
        completions = tuple(_without_end(completion, self.pad_id) for completion in fitted.completions)
        if not all(completions):
            return Refused("only_padding", "an answer is nothing but padding tokens")
        config = self.decoder.config
        longest = len(fitted.prompt) + max(map(len, completions))
        if isinstance(config.positions, Learned) and longest > config.positions.max_positions:
            return Refused("too_long", f"{longest} tokens; the model has {config.positions.max_positions} positions")
        if (largest := max(map(max, (fitted.prompt, *completions)))) >= config.vocab_size:
            raise UserError(
                f"{where} holds the token {largest}, but the reward model has embeddings for {config.vocab_size} "
                "tokens (vocab_size). Expected the tokenizer that the model was trained with."
            )
        return replace(fitted, completions=completions)


@partial(jax.jit, static_argnums=0)
def _score(scorer: Scorer, decoder: Decoder, batch: DeviceBatch) -> jax.Array:
    """The rewards [M, R, X, K] of a batch."""
    return all_scores(scorer, decoder, batch).rewards


def _preference(prompt: Said, completions: Sequence[Said]) -> Preference:
    if not completions or (not prompt and len(completions) > 1):
        raise ValueError(f"{len(completions)} completions of {'a' if prompt else 'no'} prompt")
    if isinstance(prompt, str):
        return Preference(prompt, tuple(completions))
    turns = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
    return Preference(prompt, tuple(turns))


def _shares(number: int, text: Fitted, row_length: int) -> Iterator[Share]:
    """A text's completions in as few runs as fit into rows, each with the prompt once."""
    first, room = 0, row_length - len(text.prompt)
    for k, completion in enumerate(text.completions):
        if len(completion) > room:
            yield Share(number, range(first, k))
            first, room = k, row_length - len(text.prompt)
        room -= len(completion)
    yield Share(number, range(first, len(text.completions)))


def _example(text: Fitted, share: Share, most: int) -> Example:
    ids = [text.completions[k] for k in share.answers] + [[]] * (most - len(share.answers))
    return Example(f"text {share.text}", np.asarray(text.prompt, np.int32), tuple(np.asarray(c, np.int32) for c in ids))


def _without_end(ids: list[int], pad_id: int | None) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == pad_id:
        end -= 1
    return ids[:end]
