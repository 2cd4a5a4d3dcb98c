"""Tokenised data: made once, kept on disk under a key of everything that decides it, memory-mapped.

A dataset's folder in the cache holds tokens.npy (int32, all examples one after the other), lengths.npy [N, K+1] (of the
prompt and of each completion), labels.npy [N], scores.npy [N, K], wheres.npy [N, 3] (which prefix of meta.json, which
line or row, and which part of meta.json), dropped.jsonl and meta.json.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, SupportsIndex

import numpy as np
import tokenizers
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from jaxpo import console
from jaxpo.batch import Example, Feedback
from jaxpo.config import DataConfig, DataSource
from jaxpo.data.chat import Encoder, Limits, resolve_template
from jaxpo.data.files import FileHashes
from jaxpo.data.formats import detect
from jaxpo.data.readers import JUDGEMENTS
from jaxpo.data.record import Record
from jaxpo.data.sources import Rows, open_rows, read
from jaxpo.data.templates import TEMPLATES
from jaxpo.data.tokenise import POOL_ROWS, Tokeniser, available_cores, tokenise
from jaxpo.errors import UserError

# To be raised with every change to how rows become tokens.
CODE_VERSION = 3
_ARRAYS = ("tokens", "lengths", "labels", "scores", "wheres")
_FILES = (*(f"{name}.npy" for name in _ARRAYS), "dropped.jsonl", "meta.json")


class DamagedCacheError(Exception):
    """A dataset's folder in the cache is incomplete or does not hold what it says."""


class TokenizedDataset:
    """Examples of one source as token ids, read from a folder of the cache as they are asked for.

    prompt_lengths [N] and completion_lengths [N, K] are int32; a list of fewer than K answers has lengths of 0 at the
    end. labels [N] and scores [N, K] are float32, as in `Example`; scores are None where no row has any, and `unrated`
    counts the examples that have none among others that have. fingerprint: a hash of the token ids of every example,
    order included, and of nothing else; judgements: the same of labels and scores. dropped: rows left out, or answers
    where each is an example of its own, by reason; dropped_path lists them. pairs_parted: pairs that became two
    labelled answers. unread: columns that are not read. truncated: `prompt` counts examples, `completion` completions
    that were cut. boundary_moved: examples whose tokenised prompt is no prefix of prompt and completion tokenised
    together. templated: examples that the chat template rendered; the others are plain text. without_end: whole
    completions that end with no special token.
    """

    def __init__(self, folder: Path):
        """Raises DamagedCacheError where a file is missing or of the wrong size."""
        self.folder = folder
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self._tokens, self._lengths, self._labels, self._scores, self._wheres = (
                np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS
            )
            self._prefixes: list[str] = meta["prefixes"]
            self._parts: list[str] = meta["parts"]
            self._rated: int = meta["rated"]
            self.key: dict[str, Any] = meta["key"]
            self.path: str = meta["key"]["path"]
            self.split: str = meta["key"]["split"]
            self.format: str = meta["format"]
            self.feedback: Feedback = meta["key"]["feedback"]
            self.num_completions: int = meta["key"]["num_completions"]
            self.fingerprint: str = meta["fingerprint"]
            self.judgements: str = meta["judgements"]
            self.rows_read: int = meta["rows_read"]
            self.dropped: dict[str, int] = meta["dropped"]
            self.pairs_parted: int = meta["pairs_parted"]
            self.unread: list[str] = meta["unread"]
            self.truncated: dict[str, int] = meta["truncated"]
            self.boundary_moved: int = meta["boundary_moved"]
            self.lost: str | None = meta["lost"]
            self.templated: int = meta["templated"]
            self.without_end: int = meta["without_end"]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise DamagedCacheError(f"{folder}: {' '.join(str(error).split())}") from error
        N, K = meta["examples"], self.num_completions
        shapes = {"lengths": (N, K + 1), "labels": (N,), "scores": (N, K), "wheres": (N, 3)}
        found = (self._lengths.shape, self._labels.shape, self._scores.shape, self._wheres.shape)
        for (name, shape), seen in zip(shapes.items(), found, strict=True):
            if seen != shape:
                raise DamagedCacheError(f"{folder}: {name}.npy is of shape {seen}, expected {shape}")
        if not self.dropped_path.is_file():
            raise DamagedCacheError(f"{folder}: dropped.jsonl is missing")
        # Where each part of each example begins, and where the last one ends.
        self._starts = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        if self._tokens.shape != (self._starts[-1],):
            raise DamagedCacheError(
                f"{folder}: tokens.npy holds {self._tokens.size} tokens, expected {self._starts[-1]}"
            )

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: SupportsIndex) -> Example:
        i = index.__index__()
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        parts = self.num_completions + 1
        bounds = self._starts[i * parts : (i + 1) * parts + 1]
        prompt, *completions = (np.asarray(self._tokens[a:b]) for a, b in pairwise(bounds))
        scores = np.asarray(self._scores[i]) if self._rated else None
        return Example(self.id(i), prompt, tuple(completions), float(self._labels[i]), scores)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenizedDataset, (self.folder,)

    def id(self, index: int) -> str:
        """Where the example comes from, `path:line` or `path:row N`, and which of the row's answers it is, if one."""
        prefix, number, part = self._wheres[index].tolist()
        return f"{self._prefixes[prefix]}{number}{self._parts[part]}"

    @property
    def prompt_lengths(self) -> np.ndarray:
        return np.asarray(self._lengths[:, 0])

    @property
    def completion_lengths(self) -> np.ndarray:
        return np.asarray(self._lengths[:, 1:])

    @property
    def labels(self) -> np.ndarray:
        return np.asarray(self._labels)

    @property
    def scores(self) -> np.ndarray | None:
        return np.asarray(self._scores) if self._rated else None

    @property
    def unrated(self) -> int:
        return len(self) - self._rated if self._rated else 0

    @property
    def soft(self) -> bool:
        """Whether any label is a probability: neither 0 nor 1 of a labelled answer, not 1 of answers in order."""
        certain = (0.0, 1.0) if self.feedback == "label" else (1.0,)
        return not bool(np.isin(self._labels, certain).all())

    @property
    def dropped_path(self) -> Path:
        """JSON Lines of {"where", "reason", "excerpt"}, one per row left out."""
        return self.folder / "dropped.jsonl"

    def prompt_groups(self) -> np.ndarray:
        """A number [N] for each example, the same for those with the same prompt tokens, counted from 0."""
        return self._groups(1)

    def contradictions(self) -> int:
        """How many answers to the same prompt are desirable in one example and undesirable in another."""
        groups, labels = self._groups(2), self.labels
        return len(np.intersect1d(groups[labels > 0.5], groups[labels < 0.5]))

    def _groups(self, parts: int) -> np.ndarray:
        """A number [N] for each example, the same for those whose first `parts` parts have the same tokens, from 0."""
        tokens, starts = np.asarray(self._tokens), self._starts[:: self.num_completions + 1].tolist()
        seen: dict[bytes, int] = {}
        groups = []
        for start, lengths in zip(starts, np.asarray(self._lengths[:, :parts]), strict=False):
            said = hashlib.blake2b(lengths.tobytes() + tokens[start : start + lengths.sum()].tobytes(), digest_size=16)
            groups.append(seen.setdefault(said.digest(), len(seen)))
        return np.asarray(groups, np.int64)

    def verify(self) -> None:
        """Read every token; raises DamagedCacheError where they are not the ones that were written."""
        tokens = hashlib.sha256(np.ascontiguousarray(self._tokens).data)
        if _fingerprint(tokens.digest(), np.asarray(self._lengths)) != self.fingerprint:
            raise DamagedCacheError(f"{self.folder}: tokens.npy or lengths.npy was changed since it was written")
        if _judgements(np.asarray(self._labels), np.asarray(self._scores), self._rated) != self.judgements:
            raise DamagedCacheError(f"{self.folder}: labels.npy or scores.npy was changed since it was written")


def prepare(
    source: DataSource,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_fingerprint: str,
    feedback: Feedback,
    num_completions: int,
) -> TokenizedDataset:
    """The source's examples of `num_completions` completions, from the cache or tokenised now, with a progress bar.

    feedback: what the objective learns from.

    Raises UserError for what is wrong with the source, a row or the settings, and where every row is dropped. A damaged
    cache is made anew, with a warning.
    """
    if config.max_prompt_length is not None and config.max_prompt_length >= config.max_length:
        raise UserError(
            f"data.max_prompt_length is {config.max_prompt_length} and data.max_length {config.max_length}: a prompt "
            "of the full length would leave no room for an answer. Expected max_prompt_length < max_length."
        )
    template = resolve_template(tokenizer, config.chat_template)
    rows = open_rows(source)
    cache = config.cache_dir.expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir {config.cache_dir} cannot be used: {error}.") from error
    limits = _limits(config)
    key = {
        "libraries": [tokenizers.__version__, transformers.__version__],
        "content": rows.fingerprint(FileHashes(cache / "hashes")),
        "tokenizer": tokenizer_fingerprint,
        "template": template,
        **_asked(source, limits, feedback, num_completions),
    }
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    try:
        with FileLock(f"{folder}.lock"):
            dataset = _open(folder)
            if dataset is None:
                _warn_of_markers(config.chat_template, tokenizer)
                _make(folder, key, rows, Encoder(tokenizer, template), limits, config.workers or available_cores())
                dataset = TokenizedDataset(folder)
    except OSError as error:
        raise UserError(f"data.cache_dir {config.cache_dir} cannot be used: {error}.") from error
    _warn_of(dataset)
    return dataset


def last(source: DataSource, config: DataConfig, feedback: Feedback, num_completions: int) -> TokenizedDataset | None:
    """The source's examples as they were tokenised last with these settings, whatever rows and tokenizer were then.

    None where they are not in the cache. Neither the source nor a tokenizer is looked for.
    """
    asked = _asked(source, _limits(config), feedback, num_completions)
    metas = config.cache_dir.expanduser().glob("*/meta.json")
    for meta in sorted(metas, key=lambda file: -file.stat().st_mtime):
        try:
            dataset = TokenizedDataset(meta.parent)
        except DamagedCacheError:
            continue
        if asked.items() <= dataset.key.items():
            return dataset
    return None


def _limits(config: DataConfig) -> Limits:
    return Limits(config.max_length, config.max_prompt_length, config.truncate_prompt)


def _asked(source: DataSource, limits: Limits, feedback: Feedback, num_completions: int) -> dict[str, Any]:
    """What the key of a dataset in the cache takes from the configuration."""
    return {
        "code_version": CODE_VERSION,
        "path": source.path,
        "split": source.split,
        "format": source.format,
        "limit": source.limit,
        "limits": asdict(limits),
        "feedback": feedback,
        "num_completions": num_completions,
    }


def _open(folder: Path) -> TokenizedDataset | None:
    """The dataset in the cache, None where there is none or a damaged one, which is removed."""
    if not folder.exists():
        return None
    try:
        dataset = TokenizedDataset(folder)
        dataset.verify()
    except DamagedCacheError as error:
        console.warn(f"the cache of tokenised data is damaged and made anew: {error}")
        shutil.rmtree(folder)
        return None
    return dataset


def _make(folder: Path, key: dict[str, Any], rows: Rows, encoder: Encoder, limits: Limits, workers: int) -> None:
    """Tokenise into a folder beside, and put it in its place when it is whole."""
    for left_behind in folder.parent.glob(f"{folder.name}.*.partial"):
        shutil.rmtree(left_behind, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        _write(partial, key, rows, encoder, limits, workers)
        try:
            partial.rename(folder)
        except OSError:
            # Another machine, which the lock did not hold back, was first with the same content.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(partial: Path, key: dict[str, Any], rows: Rows, encoder: Encoder, limits: Limits, workers: int) -> None:
    source, num_completions = rows.source, key["num_completions"]
    stream = read(source)
    head = list(islice(stream, POOL_ROWS))
    reading = detect(Record(*head[0]), source.format, key["feedback"], num_completions)
    tokeniser = Tokeniser(encoder, reading, num_completions, limits)
    total: int | None = len(head)
    if total < POOL_ROWS:
        workers = 1
    elif (total := rows.count()) is not None:
        total = min(total, source.limit or total)

    prefixes: dict[str, int] = {}
    parts: dict[str, int] = {}
    rows_read = 0
    lengths: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    wheres: list[tuple[int, int, int]] = []
    counts: Counter[str] = Counter()
    columns: set[str] = set()
    dropped: Counter[str] = Counter()
    lost: str | None = None
    digest = hashlib.sha256()
    first_drop = None
    with (
        console.progress(f"Tokenising {source.path}", total, "rows") as bar,
        (partial / "dropped.jsonl").open("w", encoding="utf-8") as drops,
        (partial / "tokens.npy").open("wb") as tokens,
    ):
        _npy_header(tokens, 0)
        for chunk in tokenise(chain(head, stream), tokeniser, workers):
            tokens.write(chunk.tokens.data)
            digest.update(chunk.tokens.data)
            lengths.append(chunk.lengths)
            labels.append(chunk.labels)
            scores.append(chunk.scores)
            wheres += [
                (prefixes.setdefault(w.prefix, len(prefixes)), w.number, parts.setdefault(w.part, len(parts)))
                for w in chunk.wheres
            ]
            rows_read += chunk.rows
            counts += chunk.counts
            columns |= chunk.columns
            lost = lost if lost is not None else chunk.lost
            for drop in chunk.drops:
                first_drop = first_drop or drop
                dropped[drop.reason] += 1
                line = {"where": str(drop.where), "reason": drop.reason, "excerpt": drop.excerpt}
                drops.write(json.dumps(line, ensure_ascii=False) + "\n")
            bar.advance(chunk.rows)
        all_lengths = np.concatenate(lengths)
        tokens.seek(0)
        _npy_header(tokens, int(all_lengths.sum()))
    if first_drop is not None and not wheres:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common())
        raise UserError(
            f"{source.path}: every row is dropped ({reasons}), so there is nothing to train on. The first: "
            f"{first_drop.where}, {first_drop.reason}: {first_drop.excerpt}"
        )
    all_labels, all_scores = np.concatenate(labels), np.concatenate(scores)
    arrays = {
        "lengths": all_lengths,
        "labels": all_labels,
        "scores": all_scores,
        "wheres": np.asarray(wheres, np.int32),
    }
    for name, array in arrays.items():
        np.save(partial / f"{name}.npy", array)
    meta = {
        "key": key,
        "format": reading.format,
        "examples": len(wheres),
        "rows_read": rows_read,
        "dropped": dict(dropped.most_common()),
        "pairs_parted": counts["pairs_parted"],
        "unread": sorted(columns - reading.shape.reads),
        "rated": counts["rated"],
        "truncated": {"prompt": counts["prompt_cut"], "completion": counts["completion_cut"]},
        "boundary_moved": counts["boundary_moved"],
        "lost": lost,
        "templated": counts["templated"],
        "without_end": counts["without_end"],
        "prefixes": list(prefixes),
        "parts": list(parts),
        "fingerprint": _fingerprint(digest.digest(), all_lengths),
        "judgements": _judgements(all_labels, all_scores, counts["rated"]),
    }
    (partial / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
    for name in _FILES:
        with (partial / name).open("rb") as written:
            os.fsync(written.fileno())


def _npy_header(stream: BinaryIO, size: int) -> None:
    """A header of a 1-d int32 array; NumPy leaves room in it for the size to grow, so that it can be written again."""
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i4", "fortran_order": False, "shape": (size,)})


def _fingerprint(tokens_digest: bytes, lengths: np.ndarray) -> str:
    return hashlib.sha256(
        tokens_digest + repr(lengths.shape).encode() + lengths.astype("<i4", order="C").tobytes()
    ).hexdigest()


def _judgements(labels: np.ndarray, scores: np.ndarray, rated: int) -> str:
    parts = (repr((scores.shape, rated)).encode(), labels.astype("<f4").tobytes(), scores.astype("<f4").tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _warn_of_markers(chat_template: str | None, tokenizer: PreTrainedTokenizerFast) -> None:
    template = TEMPLATES.get(chat_template or "")
    missing = [m for m in template.markers if m not in tokenizer.get_vocab()] if template else []
    if missing:
        console.warn(
            f"data.chat_template {chat_template} writes {', '.join(missing)}, which this tokenizer has no single token "
            "for: the model has to learn them from pieces."
        )


def _warn_of(dataset: TokenizedDataset) -> None:
    n = len(dataset)
    if dataset.pairs_parted:
        console.say(f"{dataset.path}: {dataset.pairs_parted} pairs are read as {n} labelled answers.")
    if unheard := sorted(JUDGEMENTS & set(dataset.unread)):
        console.say(
            f"{dataset.path}: {', '.join(unheard)} not read: rows of format {dataset.format} have no use for it."
        )
    if dataset.boundary_moved:
        console.warn(
            f"{dataset.path}: in {dataset.boundary_moved} of {n} examples the tokenised prompt is no prefix of prompt "
            "and completion tokenised together, because the template renders the prompt otherwise when an answer "
            "follows, or because tokens merge across the boundary. The completion begins where the two part; left out "
            f"of the first such prompt: {dataset.lost!r}. In training the model sees another context than when it "
            "generates."
        )
    if dataset.without_end:
        console.warn(
            f"{dataset.path}: {dataset.without_end} of {np.count_nonzero(dataset.completion_lengths)} completions end "
            "with no special token, so a model trained on them does not learn to stop. Does the chat template end an "
            "assistant's turn?"
        )
