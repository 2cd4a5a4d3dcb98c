"""What the trainer will see of the data: counts and lengths, and examples token by token with their masks."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxpo import console
from jaxpo.batch import Example, Feedback
from jaxpo.data.loader import Source
from jaxpo.data.pack import Packing

PERCENTILES = (0, 10, 50, 90, 99, 100)
# Tokens shown at each end of a prompt or a completion.
EDGE = 12
# What is cut, by its name in a dataset's counts.
CUT = {"prompt": "prompts cut", "completion": "completions cut", "mismatched": "mismatched answers cut"}


@dataclass(frozen=True)
class Token:
    """A token of an example. part: 0 for the prompt, k for completion k (from 1). position: in the model's context.

    trained: whether the loss learns it; a mismatched answer, to another prompt, is only measured. `text` is the token
    decoded alone, or the vocabulary's own spelling where a token is a piece of a character.
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


def tokens(example: Example, tokenizer: PreTrainedTokenizerFast, feedback: Feedback) -> list[Token]:
    """Every token of an example: the prompt once, then each completion, whose positions go on after the prompt's."""
    learnt = (1,) if feedback == "label" else range(1, len(example.completions) + 1)
    parts = [(0, 0, example.prompt)]
    parts += [(k, len(example.prompt), completion) for k, completion in enumerate(example.completions, 1)]
    return [
        Token(id, _spelt(id, tokenizer), part, position, trained=part in learnt)
        for part, start, ids in parts
        for position, id in enumerate(ids.tolist(), start)
    ]


def packing_fill(dataset: Source, packing: Packing, batch_size: int, batches: int = 64) -> Fill:
    """How the first `batches` batches would pack, in file order; examples longer than a row are left aside."""
    sizes = packing.size(dataset.prompt_lengths, dataset.completion_lengths)
    fits = sizes[sizes <= packing.row_length][: batches * batch_size]
    groups = [fits[start : start + batch_size].tolist() for start in range(0, len(fits), batch_size)]
    layouts = [packing.rows_of(group) for group in groups]
    rows = [len(rows) for _, rows in layouts]
    places = sum(len(rows) * T for T, rows in layouts)
    return Fill(
        fraction=float(fits.sum()) / places if places else 0.0,
        rows_per_batch=float(np.mean(rows)) if rows else 0.0,
        too_long=int((sizes > packing.row_length).sum()),
    )


def show_summary(dataset: Source) -> None:
    """Print what was read, kept, dropped and cut, what the rows say of their answers, and the lengths."""
    n, K = len(dataset), dataset.num_completions
    how = "through the chat template" if dataset.templated == n else "as plain text"
    if 0 < dataset.templated < n:
        how = f"{dataset.templated} through the chat template, the others as plain text"
    rows: list[tuple[str, object]] = [
        ("format", f"{dataset.format}, {how}"),
        ("rows read", dataset.rows_read),
        *([("columns not read", ", ".join(dataset.unread))] if dataset.unread else []),
        ("examples kept", n),
        *((f"dropped: {reason}", count) for reason, count in dataset.dropped.items()),
        *judgements(dataset),
        *((CUT[part], count) for part, count in dataset.truncated.items()),
        ("prompt and completion part early", dataset.boundary_moved),
        ("completions without an end", dataset.without_end),
    ]
    console.table(f"{dataset.path} ({dataset.split})", ("", "value"), rows)
    prompts, completions = dataset.prompt_lengths, dataset.completion_lengths
    lengths = [("prompt", prompts)]
    # A list with fewer answers has completions of no tokens, which are none.
    parts = [(part_name(k, K, dataset.feedback), completions[:, k - 1]) for k in range(1, K + 1)]
    lengths += [(name, of[of > 0]) for name, of in parts if of.any()]
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


def judgements(dataset: Source) -> list[tuple[str, object]]:
    """What the rows say of their answers, counted, to be shown in a table."""
    labels, sizes = dataset.labels, np.count_nonzero(dataset.completion_lengths, axis=1)
    rows: list[tuple[str, object]] = []
    if dataset.pairs_parted:
        rows += [("pairs, read as two answers", dataset.pairs_parted)]
    if dataset.feedback == "label":
        rows += [("desirable", int((labels > 0.5).sum())), ("undesirable", int((labels < 0.5).sum()))]
        if contradictions := dataset.contradictions():
            rows += [("answers labelled both ways", contradictions)]
    if dataset.feedback == "ranking":
        rows += [(f"lists of {size}", int((sizes == size).sum())) for size in np.unique(sizes).tolist()]
    if dataset.soft:
        soft = labels[(labels < 1.0) & ((labels > 0.0) | (dataset.feedback != "label"))]
        rows += [("soft labels", f"{len(soft)}, {soft.mean():.3f} on average")]
    if dataset.scores is not None:
        rated = len(dataset) - dataset.unrated
        last = dataset.scores[np.arange(len(dataset)), sizes - 1]
        gap = float((dataset.scores[:, 0] - last).sum()) / rated
        rows += [("with scores", f"{rated}, the best {gap:.3g} above the worst on average")]
    return rows


def show_fill(fill: Fill, packing: Packing, batch_size: int) -> None:
    """Print how batches pack."""
    aside = " without the examples that fit into no row" if fill.too_long else ""
    console.say(
        f"packing{aside}: {fill.fraction:.1%} of the places in rows of {packing.row_length} tokens hold a token; "
        f"a batch of {batch_size} examples takes {fill.rows_per_batch:.1f} rows on average"
    )
    if fill.too_long:
        console.warn(f"{fill.too_long} examples are longer than training.row_length {packing.row_length}")


def show_example(
    example: Example, tokenizer: PreTrainedTokenizerFast, feedback: Feedback, edge: int | None = EDGE
) -> None:
    """Print an example as text with its special tokens, and token by token with what is trained on.

    feedback: of the dataset that the example is from. `edge`: tokens shown at each end of the prompt and of every
    completion; None shows all.
    """
    K = len(example.completions)
    console.say(f"\n{example.id}{_verdict(example, feedback)}")
    answers = [ids for ids in example.completions if len(ids)]
    for part, ids in enumerate((example.prompt, *answers)):
        score = f", score {example.scores[part - 1]:g}" if part and example.scores is not None else ""
        console.say(f"--- {part_name(part, K, feedback)}, {len(ids)} tokens{score}")
        console.say(str(tokenizer.decode(ids.tolist(), skip_special_tokens=False)))
    rows: list[tuple[object, ...]] = []
    listed = tokens(example, tokenizer, feedback)
    for part in range(len(answers) + 1):
        own = [token for token in listed if token.part == part]
        shown: list[tuple[object, ...]] = [
            (token.position, token.id, repr(token.text), part_name(part, K, feedback), _yes(token.trained))
            for token in own
        ]
        if edge is not None and len(own) > 2 * edge + 1:
            hidden = len(own) - 2 * edge
            name = part_name(part, K, feedback)
            shown[edge:-edge] = [("…", "…", f"({hidden} more)", name, _yes(own[edge].trained))]
        rows += shown
    console.table("tokens", ("position", "id", "token", "part", "trained"), rows)


def part_name(part: int, num_completions: int, feedback: Feedback) -> str:
    """What people call a part of an example, 0 for its prompt, which several completions share, k for completion k."""
    if part == 0:
        return "prompt" if num_completions == 1 else "prompt, shared"
    if feedback == "pair":
        return ("chosen", "rejected")[part - 1]
    if feedback == "ranking":
        return f"answer {part}"
    return ("completion", "mismatched")[part - 1]


def _verdict(example: Example, feedback: Feedback) -> str:
    """What a row says of its answers, where that is not said by their order."""
    label = f"{example.label:g}"
    if feedback == "label":
        return {"1": ": desirable", "0": ": undesirable"}.get(label, f": desirable with probability {label}")
    return "" if label == "1" else f": in this order with probability {label}"


def _yes(trained: bool) -> str:
    return "yes" if trained else "no"


def _spelt(id: int, tokenizer: PreTrainedTokenizerFast) -> str:
    text = tokenizer.decode([id], skip_special_tokens=False)
    return str(tokenizer.convert_ids_to_tokens(id)) if "\ufffd" in text or not text else str(text)
