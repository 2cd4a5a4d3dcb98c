"""What the trainer will see of the data: counts and lengths, and examples token by token with their masks."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxpo import console
from jaxpo.batch import Example
from jaxpo.data.dataset import TokenizedDataset
from jaxpo.data.pack import Packing, assign_rows

PERCENTILES = (0, 10, 50, 90, 99, 100)
# Tokens shown at each end of a prompt or a completion.
EDGE = 12


@dataclass(frozen=True)
class Token:
    """A token of an example. part: 0 for the prompt, k for completion k (from 1). position: in the model's context.

    trained: whether the loss sees it; `text` is the token decoded alone, or the vocabulary's own spelling where a token
    is a piece of a character.
    """

    id: int
    text: str
    part: int
    position: int
    trained: bool


@dataclass(frozen=True)
class Fill:
    """How batches pack: the share of places in rows that hold a token, rows per batch, examples longer than a row."""

    fraction: float
    rows_per_batch: float
    too_long: int


def tokens(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[Token]:
    """Every token of an example: the prompt once, then each completion, whose positions go on after the prompt's."""
    parts = [(0, 0, example.prompt)]
    parts += [(k, len(example.prompt), completion) for k, completion in enumerate(example.completions, 1)]
    return [
        Token(id, _spelt(id, tokenizer), part, position, trained=part > 0)
        for part, start, ids in parts
        for position, id in enumerate(ids.tolist(), start)
    ]


def packing_fill(dataset: TokenizedDataset, packing: Packing, batch_size: int, batches: int = 64) -> Fill:
    """How the first `batches` batches would pack, in file order; examples longer than a row are left aside."""
    sizes = packing.size(dataset.prompt_lengths, dataset.completion_lengths)
    fits = sizes[sizes <= packing.row_length][: batches * batch_size]
    groups = [fits[start : start + batch_size].tolist() for start in range(0, len(fits), batch_size)]
    rows = [len(assign_rows(group, packing.row_length)) if packing.packed else len(group) for group in groups]
    places = sum(rows) * packing.row_length
    return Fill(
        fraction=float(fits.sum()) / places if places else 0.0,
        rows_per_batch=float(np.mean(rows)) if rows else 0.0,
        too_long=int((sizes > packing.row_length).sum()),
    )


def show_summary(dataset: TokenizedDataset) -> None:
    """Print what was read, kept, dropped and cut, and the lengths."""
    n, K = len(dataset), dataset.num_completions
    how = "through the chat template" if dataset.templated == n else "as plain text"
    if 0 < dataset.templated < n:
        how = f"{dataset.templated} through the chat template, the others as plain text"
    rows: list[tuple[str, object]] = [
        ("format", f"{dataset.format}, {how}"),
        ("rows read", dataset.rows_read),
        ("examples kept", n),
        *((f"dropped: {reason}", count) for reason, count in dataset.dropped.items()),
        ("prompts cut", dataset.truncated["prompt"]),
        ("completions cut", dataset.truncated["completion"]),
        ("prompt and completion part early", dataset.boundary_moved),
        ("completions without an end", dataset.without_end),
    ]
    console.table(f"{dataset.path} ({dataset.split})", ("", "value"), rows)
    prompts, completions = dataset.prompt_lengths, dataset.completion_lengths
    lengths = [("prompt", prompts)]
    lengths += [(completion_name(k, K), completions[:, k - 1]) for k in range(1, K + 1)]
    lengths += [("prompt + longest", prompts + completions.max(axis=1))]
    lengths += [("example", prompts + completions.sum(axis=1))]
    names = ["min", *(f"{p}%" for p in PERCENTILES[1:-1]), "max"]
    console.table(
        "tokens",
        ("", *names, "mean", "sum"),
        [
            (name, *np.percentile(of, PERCENTILES, method="lower").tolist(), f"{of.mean():.1f}", int(of.sum()))
            for name, of in lengths
        ],
    )


def show_fill(fill: Fill, packing: Packing, batch_size: int) -> None:
    """Print how batches pack."""
    console.say(
        f"packing: {fill.fraction:.1%} of the places in rows of {packing.row_length} tokens hold a token; a batch of "
        f"{batch_size} examples takes {fill.rows_per_batch:.1f} rows on average"
    )
    if fill.too_long:
        console.warn(f"{fill.too_long} examples are longer than training.row_length {packing.row_length}")


def show_example(example: Example, tokenizer: PreTrainedTokenizerFast, edge: int | None = EDGE) -> None:
    """Print an example as text with its special tokens, and token by token with what is trained on.

    `edge`: tokens shown at each end of the prompt and of every completion; None shows all.
    """
    K = len(example.completions)
    console.say(f"\n{example.id}")
    for part, ids in enumerate((example.prompt, *example.completions)):
        console.say(f"--- {part_name(part, K)}, {len(ids)} tokens")
        console.say(str(tokenizer.decode(ids.tolist(), skip_special_tokens=False)))
    rows: list[tuple[object, ...]] = []
    for part in range(K + 1):
        own = [token for token in tokens(example, tokenizer) if token.part == part]
        shown: list[tuple[object, ...]] = [
            (token.position, token.id, repr(token.text), part_name(part, K), "yes" if token.trained else "no")
            for token in own
        ]
        if edge is not None and len(own) > 2 * edge + 1:
            hidden = len(own) - 2 * edge
            shown[edge:-edge] = [("…", "…", f"({hidden} more)", part_name(part, K), "yes" if part else "no")]
        rows += shown
    console.table("tokens", ("position", "id", "token", "part", "trained"), rows)


def completion_name(k: int, num_completions: int) -> str:
    """What people call completion k, from 1."""
    return {1: "completion"}.get(num_completions, ("chosen", "rejected")[k - 1] if num_completions == 2 else str(k))


def part_name(part: int, num_completions: int) -> str:
    """What people call a part of an example; a prompt of several completions is stored once and shared by them."""
    if part:
        return completion_name(part, num_completions)
    return "prompt" if num_completions == 1 else "prompt, shared"


def _spelt(id: int, tokenizer: PreTrainedTokenizerFast) -> str:
    text = tokenizer.decode([id], skip_special_tokens=False)
    return str(tokenizer.convert_ids_to_tokens(id)) if "\ufffd" in text or not text else str(text)
