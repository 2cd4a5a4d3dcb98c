"""Formats: which columns say what, and a row of any of them as prompts with their completions.

A row, or an answer of it, that says nothing usable (equal answers, a tie) is a `Drop` with a reason; a row that cannot
be read at all is a UserError that names it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxpo.data import readers
from jaxpo.data.files import Row, Where
from jaxpo.data.readers import JUDGEMENTS, LABELS, OF_PAIRS, RENDERED, Preference, UnusableError
from jaxpo.data.record import Record, Said
from jaxpo.errors import UserError

if TYPE_CHECKING:
    from jaxpo.batch import Feedback


@dataclass(frozen=True)
class Drop:
    """Why a row, or an answer of it, is left out, and enough of it to recognise it."""

    where: Where
    reason: str
    excerpt: str


@dataclass(frozen=True)
class Shape:
    """A set of columns that a format can have, what such a row says, and how it is read: see `jaxpo.data.readers`.

    needs: all of these columns; one_of: at least one of these, if it names any; excludes: none of these, unless the
    format is named. takes: columns that are read too, where a row has them.
    """

    format: str
    needs: frozenset[str]
    says: "Feedback"
    read: Callable[[Record, int], Preference]
    excludes: frozenset[str] = frozenset()
    one_of: frozenset[str] = frozenset()
    takes: frozenset[str] = RENDERED

    @property
    def reads(self) -> frozenset[str]:
        return self.needs | self.one_of | self.takes

    def fits(self, columns: set[str]) -> bool:
        return self.needs <= columns and (not self.one_of or bool(self.one_of & columns))

    def __str__(self) -> str:
        choice = [" or ".join(sorted(self.one_of, reverse=True))] if self.one_of else []
        return f"{self.format}: {', '.join([*sorted(self.needs), *choice])}"


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read for an objective that learns from `feedback`.

    refuses: columns that no row may have, because they would judge its answers unheard. scored: whether every row says
    scores, or none.
    """

    shape: Shape
    feedback: "Feedback"
    refuses: frozenset[str]
    scored: bool

    @property
    def format(self) -> str:
        return self.shape.format

    @property
    def parts_pairs(self) -> bool:
        """Whether a pair becomes two labelled answers."""
        return self.shape.says == "pair" and self.feedback == "label"


def detect(record: Record, format: str, feedback: "Feedback", num_completions: int) -> Reading:
    """How a source's rows are read, by its first one. Raises UserError where no format fits, or several do."""
    fits = _fitting(record, format)
    usable = [shape for shape in fits if shape.says in SERVES[feedback]]
    if not usable:
        raise _unserved(record, fits[0], feedback, num_completions)
    shape = _only(record, usable, SERVES[feedback])
    refuses = JUDGEMENTS - shape.reads if format == "auto" else frozenset[str]()
    if shape.says == "pair" or shape.format == "text":
        # In public data, often a category; a pair says by itself which answer is better, and a text answers nothing.
        refuses -= {"label"}
    return Reading(shape, feedback, refuses, scored="scores" in record.columns())


def detect_answers(record: Record, format: str) -> Shape:
    """How all the answers of a source's rows are read, whatever the rows say of them; raises UserError as `detect`."""
    fits = _fitting(record, format)
    order: tuple[Feedback, ...] = ("pair", "ranking", "label", "completion")
    says = next(says for says in order if any(shape.says == says for shape in fits))
    return _only(record, [shape for shape in fits if shape.says == says], order)


def _fitting(record: Record, format: str) -> list[Shape]:
    """The shapes that a row may have, one at least."""
    columns = record.columns()
    if format == "auto":
        fits = [shape for shape in SHAPES if shape.fits(columns) and not shape.excludes & columns]
    else:
        fits = [shape for shape in SHAPES if shape.format == format and shape.fits(columns)]
    if not fits:
        raise _misfit(record, format, [shape for shape in SHAPES if format in ("auto", shape.format)])
    return fits


def _only(record: Record, usable: list[Shape], order: Sequence["Feedback"]) -> Shape:
    """The shape that says most of its answers, by `order`; UserError if there are others as good."""
    columns = record.columns()
    if len(names := sorted({shape.format for shape in usable})) > 1:
        raise UserError(
            f"{record.where} can be read as {' or '.join(names)} (columns {_listed(columns)}). Say which in "
            "data.*.format."
        )
    best = min(usable, key=lambda shape: order.index(shape.says))
    if rivals := [shape for shape in usable if shape.says == best.says and shape is not best]:
        raise UserError(
            f"{record.where} holds its answer twice, in the columns {_listed(best.needs)} and in "
            f"{_listed(rivals[0].needs)}. Expected one of the two."
        )
    return best


def parse(record: Record, reading: Reading, num_completions: int) -> list[Preference | Drop]:
    """What a row gives: an example, several of an answer each, and what is dropped of it; at least one of all these.

    An example has `num_completions` completions; of a ranking, at most so many.
    """
    columns = record.columns()
    if not reading.shape.fits(columns):
        raise _misfit(record, reading.format, [reading.shape])
    if unheard := sorted(reading.refuses & columns):
        raise _unheard(record, reading.format, unheard[0])
    if reading.shape.says == "ranking" and ("scores" in columns) != reading.scored:
        raise _half_scored(record, reading.scored)
    try:
        preferences = _preferences(record, reading, num_completions)
        _check_prompt(reading.shape, preferences[0])
    except UnusableError as unusable:
        return [Drop(record.where, str(unusable), excerpt(record.row))]
    return [_checked(record, preference) for preference in preferences]


def answers(record: Record, shape: Shape) -> Preference | Drop:
    """All answers of a row, as many as it has and in its order, without what it says of them."""
    if not shape.fits(record.columns()):
        raise _misfit(record, shape.format, [shape])
    read = readers.answer_list if shape.says == "ranking" else shape.read
    try:
        preference = read(record, 2)
        _check_prompt(shape, preference)
        _check_answers(preference.completions)
    except UnusableError as unusable:
        return Drop(record.where, str(unusable), excerpt(record.row))
    return preference


def texts(parsed: Preference | Drop) -> Iterator[str]:
    """Every text of an example, for training a tokenizer; none of what is dropped."""
    if isinstance(parsed, Drop):
        return
    for said in (parsed.prompt, *parsed.completions):
        if isinstance(said, str):
            yield said
        else:
            yield from (message["content"] for message in said)


def excerpt(row: Row) -> str:
    """The row in a line or two: the beginning and the end of every column."""
    text = " | ".join(f"{name}: {_ends(value)}" for name, value in row.items())
    # A row that is dropped may hold anything, half of a surrogate pair too.
    return text.encode(errors="backslashreplace").decode()


_CHOSEN = frozenset({"chosen", "rejected"})
_ALPACA = frozenset({"instruction", "output"})
_ASKED = frozenset({"conversations", "instruction"})
_SYSTEM = RENDERED | {"system"}
_AROUND = _SYSTEM | {"input", "history"}
SHAPES = (
    Shape("pairs", _CHOSEN | {"prompt"}, "pair", readers.pairs, excludes=_ASKED, takes=RENDERED | OF_PAIRS),
    Shape(
        "transcripts",
        _CHOSEN,
        "pair",
        readers.transcripts,
        excludes=_ASKED | {"prompt"},
        takes=RENDERED | OF_PAIRS,
    ),
    Shape(
        "helpsteer3",
        frozenset({"context", "response1", "response2", "overall_preference"}),
        "pair",
        readers.helpsteer3,
        takes=RENDERED | OF_PAIRS,
    ),
    Shape(
        "conversations",
        _CHOSEN | {"conversations"},
        "pair",
        readers.conversation_pairs,
        takes=_SYSTEM | OF_PAIRS,
    ),
    Shape(
        "conversations",
        frozenset({"conversations"}),
        "completion",
        readers.conversation,
        excludes=LABELS | _CHOSEN,
        takes=_SYSTEM,
    ),
    Shape(
        "alpaca",
        _CHOSEN | {"instruction"},
        "pair",
        readers.alpaca_pairs,
        excludes=frozenset({"conversations"}),
        takes=_AROUND | OF_PAIRS,
    ),
    Shape("alpaca", _ALPACA, "completion", readers.alpaca, excludes=LABELS | _CHOSEN, takes=_AROUND),
    Shape("completions", frozenset({"prompt", "completion"}), "completion", readers.completion, excludes=LABELS),
    Shape("messages", frozenset({"messages"}), "completion", readers.messages, excludes=LABELS),
    Shape(
        "text",
        frozenset({"text"}),
        "completion",
        readers.text,
        excludes=frozenset({"prompt", "messages"}),
        takes=frozenset(),
    ),
    Shape("labels", frozenset({"prompt", "completion"}), "label", readers.completion, one_of=LABELS),
    Shape("labels", frozenset({"messages"}), "label", readers.messages, one_of=LABELS),
    Shape(
        "labels",
        frozenset({"conversations"}),
        "label",
        readers.conversation,
        excludes=_CHOSEN,
        one_of=LABELS,
        takes=_SYSTEM,
    ),
    Shape("labels", _ALPACA, "label", readers.alpaca, excludes=_CHOSEN, one_of=LABELS, takes=_AROUND),
    Shape("labels", frozenset({"prompt", "completions", "labels"}), "label", readers.answer_list),
    Shape(
        "rankings",
        frozenset({"prompt", "completions"}),
        "ranking",
        readers.ranking,
        excludes=frozenset({"labels"}),
        takes=RENDERED | {"scores"},
    ),
)
# What rows may say to serve an objective that learns from a kind of feedback, the fullest first.
SERVES: dict["Feedback", tuple["Feedback", ...]] = {
    "completion": ("pair", "ranking", "completion"),
    "pair": ("pair",),
    "label": ("label", "pair"),
    "ranking": ("ranking", "pair"),
}
# The objectives that rows of a kind of feedback are for, as messages name them.
OBJECTIVES: dict["Feedback", str] = {
    "completion": "sft",
    "pair": "dpo and the other objectives of pairs",
    "label": "kto, bco or apo_zero_unpaired",
    "ranking": "all_pairs, plackett_luce or reward",
}


def _preferences(record: Record, reading: Reading, num_completions: int) -> list[Preference]:
    shape, feedback = reading.shape, reading.feedback
    if feedback == "completion":
        return [shape.read(record, 1)]
    if shape.says == "label":
        answers = shape.read(record, 1)
        listed = "labels" in shape.needs
        labels = readers.labels_of(record, listed, len(answers.completions))
        return _apart(answers, labels, [f" (answer {k})" if listed else "" for k in range(1, len(labels) + 1)])
    if shape.says == "pair":
        label, scores = readers.judgement(record)
        pair = replace(shape.read(record, 2), label=label, scores=scores)
        if feedback != "label":
            return [pair]
        # The same answer, desirable and not, says nothing.
        _check_different(pair)
        return _apart(replace(pair, scores=None), [label, 1.0 - label], [" (chosen)", " (rejected)"])
    return [shape.read(record, num_completions)]


def _apart(answers: Preference, labels: Iterable[float], parts: Iterable[str]) -> list[Preference]:
    """Each answer as an example of its own."""
    return [
        replace(answers, completions=(completion,), label=label, part=part)
        for completion, label, part in zip(answers.completions, labels, parts, strict=True)
    ]


def _checked(record: Record, preference: Preference) -> Preference | Drop:
    try:
        _check_answers(preference.completions)
        _check_different(preference)
    except UnusableError as unusable:
        where = record.where._replace(part=preference.part)
        return Drop(where, str(unusable), excerpt(record.row))
    return preference


def _check_prompt(shape: Shape, preference: Preference) -> None:
    if shape.read is not readers.text and _is_blank(preference.prompt):
        raise UnusableError("empty_prompt")


def _check_answers(completions: tuple[Said, ...]) -> None:
    if any(_is_blank(completion) for completion in completions):
        raise UnusableError("empty_answer")
    for completion in completions:
        if isinstance(completion, str):
            continue
        roles = {message["role"] for message in completion}
        if roles & {"user", "system", "developer"}:
            # The conversations part before the last question.
            raise UnusableError("prompts_differ")
        if completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
            raise UnusableError("answer_not_assistant")


def _check_different(preference: Preference) -> None:
    bare = [_bare(completion) for completion in preference.completions]
    if any(one in bare[:k] for k, one in enumerate(bare)):
        raise UnusableError("equal_answers")


def _is_blank(said: Said) -> bool:
    if isinstance(said, str):
        return not said.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in said)


def _bare(said: Said) -> Said:
    if isinstance(said, str):
        return said.strip()
    return [{**message, "content": message["content"].strip()} for message in said]


def _unserved(record: Record, shape: Shape, feedback: "Feedback", num_completions: int) -> UserError:
    """What to say of rows that can be read, but not for this objective."""
    found = f"{record.where} is of format {shape.format}"
    wanted = {
        "completion": "answers to learn from (columns such as prompt, completion), or pairs",
        "pair": "preference data (columns such as prompt, chosen, rejected)",
        "label": "a column label beside the answer, or preference data (columns such as prompt, chosen, rejected)",
        "ranking": "lists of answers (columns prompt, completions), or pairs",
    }[feedback]
    if shape.says == "label":
        anyway = (
            ". To train on every answer whatever its label, name the format without it in data.*.format."
            if feedback == "completion"
            else "."
        )
        return UserError(
            f"{found}: the label marks binary feedback, which is for objective.name {OBJECTIVES['label']}. Expected "
            f"one of these, or {wanted}{anyway}"
        )
    if shape.says == "ranking":
        return UserError(
            f"{found}, a list of answers in order, which is for objective.name {OBJECTIVES['ranking']}. Expected one "
            f"of these, or {wanted}."
        )
    lacks = (
        "learns from whether an answer is desirable, which no column of it says"
        if feedback == "label"
        else f"compares {num_completions} answers"
    )
    return UserError(
        f"{found}, one answer to a prompt, but the objective {lacks}. Expected {wanted}, or objective.name "
        f"{OBJECTIVES['completion']}."
    )


def _unheard(record: Record, format: str, column: str) -> UserError:
    """What to say of a column that judges answers, in a row that has no use for it."""
    belongs = next(shape for shape in SHAPES if column in shape.reads)
    return UserError(
        f"{record.where} has a column {column}, which a row of format {format} has no use for; it belongs to rows such "
        f"as {belongs}. Expected rows without it, or data.*.format: {format}, with which it is not read."
    )


def _half_scored(record: Record, scored: bool) -> UserError:
    found = "null in its column scores" if "scores" in record.row else "no column scores"
    found, first = (found, "has scores") if scored else ("a column scores", "has none")
    return UserError(
        f"{record.where} has {found}, but the first row of its source {first}. Expected scores in every row, or in "
        "none, where the first answer of each list is its best."
    )


def _misfit(record: Record, format: str, shapes: list[Shape]) -> UserError:
    columns = record.columns()
    nulls = sorted(set(record.row) - columns)
    found = f"{record.where} has the columns {_listed(columns)}" + (f" (null: {_listed(nulls)})" if nulls else "")
    wanted = "; ".join(map(str, shapes))
    return UserError(f"{found}, which fits no format that was asked for (data.*.format: {format}). Expected {wanted}.")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "(none)"


def _ends(value: Any, width: int = 100) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).split())
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
