"""Rows rated by a reward model: each gets the rewards of its answers in columns that training understands."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxpo import atomic, console
from jaxpo.config import DataSource, Dtype, Format
from jaxpo.config_checks import path_problem
from jaxpo.data import readers, sources
from jaxpo.data.chat import Fitted, Refused
from jaxpo.data.files import Row, Where
from jaxpo.data.formats import Drop, Shape, answers, detect_answers, excerpt
from jaxpo.data.readers import Preference
from jaxpo.data.record import Record
from jaxpo.errors import UserError
from jaxpo.rewards import RewardModel

# Rows that are read, and scored, at once.
CHUNK = 1024
PAIR = ("chosen_score", "rejected_score")
# What messages about data call by the keys of a config, and what that is called here.
OPTIONS = {
    "data.*.path": "ROWS",
    "data.*.split": "--split",
    "data.*.format: ": "--format ",
    "data.*.format": "--format",
    "with format: text": "with --format text",
    "data.chat_template": "--chat-template",
}


@dataclass
class Tally:
    """What became of the rows: how many are rated and left out, answers that were cut, pairs in the right order.

    The reward model and the data agree on a pair if the chosen answer has the higher reward; equal ones count one half.
    """

    rated: int = 0
    cut: int = 0
    agreed: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def drop(self, drop: Drop) -> None:
        self.first = self.first or f"{drop.where}, {drop.reason}: {drop.excerpt}"
        self.dropped[drop.reason] += 1

    def add(self, shape: Shape, fitted: Fitted, rewards: np.ndarray) -> None:
        self.rated += 1
        self.cut += fitted.completions_cut
        if shape.says == "pair":
            self.agreed += 0.5 * (1.0 + float(np.sign(rewards[0] - rewards[1])))


@contextmanager
def naming_options() -> Iterator[None]:
    """Whatever is wrong inside is told by the command's options, for it has no config."""
    try:
        yield
    except UserError as error:
        told = str(error)
        for key, option in OPTIONS.items():
            told = told.replace(key, option)
        raise UserError(told) from error


@naming_options()
def rate(
    model: str,
    rows: str,
    output: Path,
    *,
    split: str = "train",
    format: Format = "auto",
    chat_template: str | None = None,
    max_length: int | None = None,
    compute_dtype: Dtype = "float32",
) -> None:
    """Write a JSON Lines file of a source's rows with the rewards of their answers, and say which rows have none.

    A pair gets the columns chosen_score and rejected_score, a list `completions` the column scores, in its order, and a
    single answer the column rewards. Pairs and lists are then data that say by how much an answer is better.
    """
    check_paths({"MODEL": model, "ROWS": rows, "--output": str(output), "--chat-template": chat_template or ""})
    check_output(output)
    if format not in (known := get_args(Format)):
        raise UserError(f"--format is {format!r}; expected one of {', '.join(known)}.")
    source = DataSource(path=rows, split=split, format=format)
    stream = sources.read(source)
    head = next(stream)
    shape = detect_answers(Record(*head), source.format)
    judge = RewardModel.load(model, chat_template=chat_template, max_length=max_length, compute_dtype=compute_dtype)
    tally = Tally()
    total = sources.open_rows(source).count()
    remaining = chain([head], stream)
    try:
        with atomic.new_file(output) as file, console.progress(f"scoring {rows}", total, "rows") as bar:
            while chunk := list(islice(remaining, CHUNK)):
                file.writelines(rated(judge, shape, chunk, tally))
                bar.advance(len(chunk))
            if not tally.rated:
                reasons = ", ".join(f"{reason}: {count}" for reason, count in tally.dropped.most_common())
                raise UserError(f"{rows}: no row can be scored ({reasons}). The first: {tally.first}")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}.") from error
    show(tally, shape, output)


def check_paths(named: dict[str, str]) -> None:
    for option, path in named.items():
        if problem := path_problem(path):
            raise UserError(f"{option} {problem}.")


def check_output(output: Path) -> None:
    """UserError unless a JSON Lines file may be made there."""
    try:
        there = output.exists()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}.") from error
    if there:
        raise UserError(f"--output {output} is there already; expected a file to be made. Nothing was changed.")
    if output.suffix != ".jsonl":
        found = f"the suffix {output.suffix}" if output.suffix else "no suffix"
        raise UserError(f"--output {output} has {found}; expected a name that ends in .jsonl: JSON Lines are written.")


def show(tally: Tally, shape: Shape, output: Path) -> None:
    console.say(f"rows scored              {tally.rated:,}, in {output}")
    if shape.says == "pair":
        console.say(f"chosen above rejected    {tally.agreed / tally.rated:.1%}")
    if tally.cut:
        console.say(f"answers cut              {tally.cut:,}, to --max-length")
    if tally.dropped:
        console.table("rows left out", ("reason", "rows"), tally.dropped.most_common())
        console.say(f"the first: {tally.first}")


def rated(model: RewardModel, shape: Shape, rows: list[tuple[Where, Row]], tally: Tally) -> Iterator[bytes]:
    """A line of JSON for each row that can be scored."""
    read = [answers(Record(*row), shape) for row in rows]
    usable = [(row[0], one) for row, one in zip(rows, read, strict=True) if isinstance(one, Preference)]
    tokenised = iter(model.tokenise(usable))
    kept: list[tuple[Record, Fitted]] = []
    for row, one in zip(rows, read, strict=True):
        record = Record(*row)
        if isinstance(one, Drop):
            tally.drop(one)
        elif isinstance(fitted := next(tokenised), Refused):
            tally.drop(Drop(record.where, fitted.reason, f"{fitted.detail}: {excerpt(record.row)}"))
        else:
            kept.append((record, fitted))
    for (record, fitted), rewards in zip(kept, model.rewards([fitted for _, fitted in kept]), strict=True):
        tally.add(shape, fitted, rewards)
        yield line(record.where, {**record.row, **columns(record, shape, rewards)})


def columns(record: Record, shape: Shape, rewards: np.ndarray) -> dict[str, Any]:
    """The columns that say a row's rewards. UserError where it says something of the kind already."""
    values = [float(reward) for reward in rewards]
    if not np.isfinite(rewards).all():
        raise UserError(f"{record.where} gets the rewards {values}; expected a reward model whose weights are numbers.")
    new: dict[str, Any] = {"scores" if "completions" in shape.needs else "rewards": values}
    taken = set(new)
    if shape.says == "pair":
        new = dict(zip(PAIR, values, strict=True))
        # Training takes one word for how far apart the answers of a pair are.
        taken = {readers.MARGIN, *(name for names in readers.SCORES for name in names)}
    if there := sorted(taken & record.columns()):
        raise UserError(
            f"{record.where} has the columns {', '.join(there)} already; expected rows without what the reward model "
            f"is to say of them, in {', '.join(new)}."
        )
    return new


def line(where: Where, row: Row) -> bytes:
    """The row as a line of JSON."""
    try:
        return f"{json.dumps(row, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, in a column that nobody reads, can be spelt in ASCII alone.
        return f"{json.dumps(row)}\n".encode()
    except TypeError as error:
        raise UserError(
            f"{where} has a column that JSON cannot say ({error}); expected text, numbers, lists."
        ) from error
