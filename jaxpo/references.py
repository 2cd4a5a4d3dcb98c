"""The reference as a run sees it: the tables of its data, from disk or computed, and its weights where it moves."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxpo import processes
from jaxpo.config import Run
from jaxpo.data.loader import Source
from jaxpo.data.tokenizer import load_tokenizer
from jaxpo.errors import UserError
from jaxpo.models.checkpoint import Checkpoint, read_checkpoint
from jaxpo.models.decoder import Decoder
from jaxpo.prepare import Parts, check_positions, check_vocabulary, weights_of
from jaxpo.reference.compute import Examples, completion_logps
from jaxpo.reference.fingerprint import COMPLETION_LOGPROB_SUM, SHARED_LOGPROB_SUM, table_key
from jaxpo.reference.store import fill

# Fields of a decoder's config that shape new weights only, not what given weights compute.
INITIAL_ONLY = ("std", "residual_std")
# What the reference tables hold, in the order of a batch's references.
STATISTICS = (COMPLETION_LOGPROB_SUM, SHARED_LOGPROB_SUM)


class References(NamedTuple):
    """The reference's statistics [N, Q, K] of both corpora, and how many completions were computed now."""

    train: np.ndarray | None
    eval: np.ndarray | None
    computed: int
    reused: int


def references(parts: Parts, policy: Callable[[], Decoder]) -> References:
    """The reference table of every source, from disk where it is there, else computed and stored.

    `policy` gives the initial weights; it is called only if something is to be computed and they are the reference.
    """
    run = parts.run
    if not run.objective.uses_reference:
        return References(None, None, 0, 0)
    path = run.reference.path
    checkpoint = parts.checkpoint if path is None else read_checkpoint(path, run.reference.revision)
    if path is not None:
        check_same_tokenizer(parts.tokenizer, path, run.reference.revision)
    if is_averaged(run):
        check_same_architecture(parts.checkpoint, checkpoint)
    for one in parts.corpora:
        check_positions(one, checkpoint)
        check_vocabulary(one, parts.tokenizer, checkpoint)
    cache_dir = run.reference.cache_dir.expanduser()
    weights = weights_of(run, checkpoint)
    decoder_config = dataclasses.asdict(checkpoint.decoder_config)
    loaded: list[Decoder] = []

    def reference() -> Decoder:
        if path is None:
            return policy()
        if not loaded:
            loaded.append(parts.load(checkpoint))
        return loaded[0]

    def tables(source: Source) -> tuple[np.ndarray, int, int]:
        """The source's statistics [n, Q, K], a table for each of the Q, and completions computed and reused."""

        there = np.count_nonzero(source.completion_lengths, axis=1)
        computed = 0

        # Two tables that are both missing come of one pass.
        @cache
        def compute(rows: tuple[int, ...]) -> np.ndarray:
            nonlocal computed
            computed += int(there[[*rows]].sum())
            return reference_logps(parts, reference(), source)(rows)

        def filled(q: int, statistic: str) -> np.ndarray:
            key = table_key(
                weights=weights,
                decoder={name: value for name, value in decoder_config.items() if name not in INITIAL_ONLY},
                dtype=run.model.dtype,
                compute_dtype=run.model.compute_dtype,
                examples=source.fingerprint,
                num_rows=len(source),
                num_completions=source.num_completions,
                statistic=statistic,
            )

            def of_table(compute_rows: Callable[[list[int]], np.ndarray]) -> np.ndarray:
                return fill(cache_dir, key, lambda rows: compute_rows([*rows]), example_id=source.id).values

            return processes.led(of_table, lambda rows: compute(tuple(rows))[:, q])

        wanted = STATISTICS if "shared" in run.objective.statistics else STATISTICS[:1]
        each = [filled(q, statistic) for q, statistic in enumerate(wanted)]
        return np.stack(each, axis=1), computed, int(there.sum()) - computed

    found = [[tables(source) for source in one.sources] for one in parts.corpora]
    whole = [np.concatenate([values for values, _, _ in one]) for one in found]
    return References(
        train=whole[0],
        eval=whole[1] if len(whole) > 1 else None,
        computed=sum(computed for one in found for _, computed, _ in one),
        reused=sum(reused for one in found for _, _, reused in one),
    )


def is_averaged(run: Run) -> bool:
    """Whether the reference comes to be an average of models: not where it stays, nor where it becomes the policy."""
    return run.reference.sync_steps is not None and run.reference.mixup_alpha < 1.0


def check_same_architecture(policy: Checkpoint, reference: Checkpoint) -> None:
    """Raise UserError unless the weights of both can be averaged."""
    ours, theirs = (dataclasses.asdict(one.decoder_config) for one in (policy, reference))
    differing = [name for name in ours if ours[name] != theirs[name] and name not in INITIAL_ONLY]
    if differing:
        name = differing[0]
        raise UserError(
            f"reference.mixup_alpha is below 1, so the reference becomes an average of two models, but the one in "
            f"{reference.folder} is of another shape than the one to train: its {name} is {theirs[name]!r} and not "
            f"{ours[name]!r}. Expected a model of the same architecture, or a mixup_alpha of 1."
        )


def reference_weights(parts: Parts, policy: Callable[[], Decoder]) -> Decoder | None:
    """The reference model's weights where they are to be averaged with the policy's, not sharing memory with them."""
    if not is_averaged(parts.run):
        return None
    if parts.run.reference.path is None:
        return jax.tree.map(jnp.copy, policy())
    return parts.load(read_checkpoint(parts.run.reference.path, parts.run.reference.revision))


def reference_logps(parts: Parts, decoder: Decoder, examples: Examples) -> Callable[[Sequence[int]], np.ndarray]:
    """A function from indices of examples to a reference decoder's statistics [n, Q, K] of them."""
    scorer = dataclasses.replace(parts.scorer, statistics=parts.scorer.statistics & {"shared"})
    packing = dataclasses.replace(parts.packing, score_prompt=False)
    return completion_logps(decoder, examples, scorer, packing, parts.put)


def check_same_tokenizer(tokenizer: PreTrainedTokenizerFast, path: str, revision: str | None) -> None:
    """Raise UserError if the reference model at `path` was trained with other token ids: its log-probs mean nothing."""
    if Path(path).expanduser().is_dir() and not (Path(path).expanduser() / "tokenizer.json").is_file():
        return
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(path, revision).get_vocab()
    shared = ours.keys() & theirs.keys()
    moved = next((token for token in sorted(shared) if ours[token] != theirs[token]), None)
    if moved is not None or 2 * len(shared) < len(ours):
        found = (
            "it shares few of its tokens" if moved is None else f"{moved!r} is {theirs[moved]} and not {ours[moved]}"
        )
        raise UserError(
            f"reference.path is {path}, whose tokenizer is not that of the model to train: {found}. Expected a "
            "reference model with the same token ids."
        )
