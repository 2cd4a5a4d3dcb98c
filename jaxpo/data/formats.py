"""Formats: which columns say what, and a row of any of them as a prompt with its completions.

A row that says nothing usable (equal answers, a tie) is a `Drop` with a reason; a row that cannot be read at all is a
UserError that names it.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxpo.data.files import Row, Where
from jaxpo.data.record import Message, Record, Said, shown
from jaxpo.errors import UserError

# A column of these marks binary feedback: an answer in such a row may be a bad one.
LABELS = frozenset({"label", "kto_tag"})
SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))

_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """A prompt with its completions, the chosen one first: all plain text, or all lists of messages.

    `template_kwargs` go to the chat template: the row's `tools` and `chat_template_kwargs`.
    """

    prompt: Said
    completions: tuple[Said, ...]
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Drop:
    """Why a row is left out, and enough of it to recognise it."""

    where: Where
    reason: str
    excerpt: str


class _UnusableError(Exception):
    """Carries a drop reason up to `parse`."""


@dataclass(frozen=True)
class Shape:
    """A set of columns that a format can have, how many completions such a row gives, and how it is read."""

    format: str
    needs: frozenset[str]
    excludes: frozenset[str]
    completions: int
    read: Callable[[Record, int], Preference]


def detect(record: Record, format: str, num_completions: int) -> Shape:
    """The shape of a source's rows by its first one. Raises UserError where none fits, or several formats do."""
    columns = record.columns()
    if format == "auto":
        fits = [shape for shape in SHAPES if shape.needs <= columns and not shape.excludes & columns]
    else:
        fits = [shape for shape in SHAPES if shape.format == format and shape.needs <= columns]
    enough = [shape for shape in fits if shape.completions >= num_completions]
    if not fits:
        raise _misfit(record, format)
    if not enough:
        raise UserError(
            f"{record.where} is of format {fits[0].format}, one answer to a prompt, but the objective compares "
            f"{num_completions} answers. Expected preference data (columns such as prompt, chosen, rejected), or "
            "objective.name sft."
        )
    if len(names := sorted({shape.format for shape in enough})) > 1:
        raise UserError(
            f"{record.where} can be read as {' or '.join(names)} (columns {_listed(columns)}). Say which in "
            "data.*.format."
        )
    return max(enough, key=lambda shape: shape.completions)


def parse(record: Record, shape: Shape, num_completions: int) -> Preference | Drop:
    """A row as a prompt with `num_completions` completions; of a pair for one, the chosen."""
    if not shape.needs <= record.columns():
        raise _misfit(record, shape.format)
    try:
        preference = shape.read(record, num_completions)
        _check(preference, shape)
    except _UnusableError as unusable:
        return Drop(record.where, str(unusable), excerpt(record.row))
    return preference


def texts(preference: Preference) -> Iterator[str]:
    """Every text of a row, for training a tokenizer."""
    for said in (preference.prompt, *preference.completions):
        if isinstance(said, str):
            yield said
        else:
            yield from (message["content"] for message in said)


def excerpt(row: Row) -> str:
    """The row in a line or two: the beginning and the end of every column."""
    text = " | ".join(f"{name}: {_ends(value)}" for name, value in row.items())
    # A row that is dropped may hold anything, half of a surrogate pair too.
    return text.encode(errors="backslashreplace").decode()


def _pairs(record: Record, n: int) -> Preference:
    _check_scores(record, n)
    prompt, chosen, rejected = record.said("prompt"), record.said("chosen"), record.said("rejected")
    answers = [chosen, rejected][:n]
    kwargs = record.template_kwargs()
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return Preference(prompt, tuple(answers), kwargs)
    turns = [_as_answer(answer) for answer in answers]
    if isinstance(prompt, list):
        return Preference(prompt, tuple(_after(prompt, answer) for answer in turns), kwargs)
    if all(answer[0]["role"] == "assistant" for answer in turns):
        return Preference([{"role": "user", "content": prompt}], tuple(turns), kwargs)
    # UltraFeedback: the prompt column repeats a message of the conversations.
    shared, rests = _split_turns(turns)
    if not any(_same_text(prompt, message["content"]) for message in shared):
        raise _UnusableError("prompts_differ")
    return Preference(shared, rests, kwargs)


def _transcripts(record: Record, n: int) -> Preference:
    _check_scores(record, n)
    chosen, rejected = record.said("chosen"), record.said("rejected")
    kwargs = record.template_kwargs()
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not (_is_hh(chosen) and _is_hh(rejected)):
            prompt, answers = _split_text(chosen, rejected)
            return Preference(prompt, answers[:n], kwargs)
        chosen, rejected = _hh_turns(chosen), _hh_turns(rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise record.wrong("rejected", f"of the same kind as column chosen, {shown(record.row['chosen'])}")
    shared, rests = _split_turns([chosen, rejected][:n])
    return Preference(shared, rests, kwargs)


def _helpsteer3(record: Record, n: int) -> Preference:
    preferred = record.number("overall_preference")
    if preferred == 0:
        raise _UnusableError("tie")
    answers = [_as_answer(record.said("response1")), _as_answer(record.said("response2"))]
    # Negative: the first response is the better one.
    ordered = answers if preferred < 0 else answers[::-1]
    context = record.said("context")
    prompt = [{"role": "user", "content": context}] if isinstance(context, str) else context
    return Preference(prompt, tuple(ordered[:n]), record.template_kwargs())


def _conversation_pairs(record: Record, n: int) -> Preference:
    _check_scores(record, n)
    answers = tuple(_as_answer(record.said(column)) for column in ("chosen", "rejected")[:n])
    return Preference(_with_system(record, record.turns("conversations")), answers, record.template_kwargs())


def _conversation(record: Record, n: int) -> Preference:
    return _last_turn(_with_system(record, record.turns("conversations")), record)


def _alpaca_prompt(record: Record) -> list[Message]:
    turns: list[Message] = []
    history = record.row.get("history") or []
    if not isinstance(history, list):
        raise record.wrong("history", "a list of [question, answer]")
    for i, pair in enumerate(history):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise record.wrong("history", f"[question, answer] at index {i}")
        asked, answered = (record.encodable(f"history[{i}]", text) for text in pair)
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    asked = record.text("instruction")
    if "input" in record.columns() and (given := record.text("input")):
        asked = f"{asked}\n{given}"
    return _with_system(record, [*turns, {"role": "user", "content": asked}])


def _alpaca_pairs(record: Record, n: int) -> Preference:
    _check_scores(record, n)
    answers = tuple(_as_answer(record.said(column)) for column in ("chosen", "rejected")[:n])
    return Preference(_alpaca_prompt(record), answers, record.template_kwargs())


def _alpaca(record: Record, n: int) -> Preference:
    return Preference(_alpaca_prompt(record), (_as_answer(record.text("output")),), record.template_kwargs())


def _completions(record: Record, n: int) -> Preference:
    prompt, completion = record.said("prompt"), record.said("completion")
    kwargs = record.template_kwargs()
    if isinstance(prompt, str) and isinstance(completion, str):
        return Preference(prompt, (completion,), kwargs)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Preference(turns, (_after(turns, _as_answer(completion)),), kwargs)


def _messages(record: Record, n: int) -> Preference:
    return _last_turn(record.turns("messages"), record)


def _text(record: Record, n: int) -> Preference:
    return Preference("", (record.text("text"),))


_ANY: frozenset[str] = frozenset()
SHAPES = (
    Shape("pairs", frozenset({"prompt", "chosen", "rejected"}), frozenset({"conversations", "instruction"}), 2, _pairs),
    Shape(
        "transcripts",
        frozenset({"chosen", "rejected"}),
        frozenset({"prompt", "conversations", "instruction"}),
        2,
        _transcripts,
    ),
    Shape("helpsteer3", frozenset({"context", "response1", "response2", "overall_preference"}), _ANY, 2, _helpsteer3),
    Shape("conversations", frozenset({"conversations", "chosen", "rejected"}), _ANY, 2, _conversation_pairs),
    Shape("conversations", frozenset({"conversations"}), LABELS | {"chosen", "rejected"}, 1, _conversation),
    Shape("alpaca", frozenset({"instruction", "chosen", "rejected"}), frozenset({"conversations"}), 2, _alpaca_pairs),
    Shape("alpaca", frozenset({"instruction", "output"}), LABELS | {"chosen", "rejected"}, 1, _alpaca),
    Shape("completions", frozenset({"prompt", "completion"}), LABELS, 1, _completions),
    Shape("messages", frozenset({"messages"}), LABELS, 1, _messages),
    Shape("text", frozenset({"text"}), frozenset({"prompt", "messages"}), 1, _text),
)


def _check_scores(record: Record, n: int) -> None:
    """Scores that do not tell the answers apart, or tell the opposite, leave no preference to learn from."""
    if n == 1:
        return
    columns = record.columns()
    for chosen, rejected in SCORES:
        if len(found := {chosen, rejected} & columns) == 1:
            raise UserError(f"{record.where} has {found.pop()} but not both of {chosen} and {rejected}.")
        if found:
            difference = record.number(chosen) - record.number(rejected)
            if difference <= 0:
                raise _UnusableError("tie" if difference == 0 else "scores_contradict")


def _check(preference: Preference, shape: Shape) -> None:
    if shape.read is not _text and _is_blank(preference.prompt):
        raise _UnusableError("empty_prompt")
    if any(_is_blank(completion) for completion in preference.completions):
        raise _UnusableError("empty_answer")
    for completion in preference.completions:
        if isinstance(completion, str):
            continue
        roles = {message["role"] for message in completion}
        if roles & {"user", "system", "developer"}:
            # The conversations part before the last question.
            raise _UnusableError("prompts_differ")
        if completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant":
            raise _UnusableError("answer_not_assistant")
    if len(preference.completions) > 1 and _bare(preference.completions[0]) == _bare(preference.completions[1]):
        raise _UnusableError("equal_answers")


def _last_turn(turns: list[Message], record: Record) -> Preference:
    if turns[-1]["role"] != "assistant":
        raise _UnusableError("answer_not_assistant")
    return Preference(turns[:-1], (turns[-1:],), record.template_kwargs())


def _with_system(record: Record, turns: list[Message]) -> list[Message]:
    if "system" in record.columns() and (system := record.text("system")):
        return [{"role": "system", "content": system}, *turns]
    return turns


def _as_answer(said: Said) -> list[Message]:
    return [{"role": "assistant", "content": said}] if isinstance(said, str) else said


def _after(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """The answer without the prompt, where it repeats it."""
    if len(answer) > len(prompt) and answer[: len(prompt)] == prompt:
        return answer[len(prompt) :]
    return answer


def _split_turns(conversations: list[list[Message]]) -> tuple[list[Message], tuple[list[Message], ...]]:
    """The turns that all conversations begin with, at most all but the last one's, and what follows in each."""
    if len(conversations) > 1 and all(turns == conversations[0] for turns in conversations):
        raise _UnusableError("equal_answers")
    if len(conversations) == 1:
        return conversations[0][:-1], (conversations[0][-1:],)
    shared = 0
    for turns in zip(*conversations, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    rests = tuple(turns[shared:] for turns in conversations)
    # An answer is one message, or several with the results of tools between them; else they part in an earlier turn.
    if any(len(rest) > 1 and all(turn["role"] != "tool" for turn in rest) for rest in rests):
        raise _UnusableError("prompts_differ")
    return conversations[0][:shared], rests


def _split_text(chosen: str, rejected: str) -> tuple[str, tuple[str, str]]:
    """The characters both begin with, as TRL's extract_prompt: a space before the difference goes to the answers."""
    if chosen == rejected:
        raise _UnusableError("equal_answers")
    end = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if end is None:
        raise _UnusableError("empty_answer")
    if end and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end], (chosen[end:], rejected[end:])


def _is_hh(text: str) -> bool:
    return _HH_TURN.match(text) is not None


def _hh_turns(text: str) -> list[Message]:
    parts = _HH_TURN.split(text)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": _HH_ROLES[who], "content": said.strip()} for who, said in pairs]


def _is_blank(said: Said) -> bool:
    if isinstance(said, str):
        return not said.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in said)


def _bare(said: Said) -> Said:
    if isinstance(said, str):
        return said.strip()
    return [{**message, "content": message["content"].strip()} for message in said]


def _same_text(prompt: str, content: str) -> bool:
    a, b = prompt.strip(), content.strip()
    return bool(a and b) and (a in b or b in a)


def _misfit(record: Record, format: str) -> UserError:
    columns = record.columns()
    nulls = sorted(set(record.row) - columns)
    found = f"{record.where} has the columns {_listed(columns)}" + (f" (null: {_listed(nulls)})" if nulls else "")
    shapes = [shape for shape in SHAPES if format in ("auto", shape.format)]
    if format == "auto" and columns & LABELS and any(shape.needs <= columns for shape in shapes):
        return UserError(
            f"{found}: the label marks binary feedback, which no objective here learns from. To train on every answer "
            "whatever its label, name the format in data.*.format."
        )
    wanted = "; ".join(f"{shape.format}: {', '.join(sorted(shape.needs))}" for shape in shapes)
    return UserError(f"{found}, which fits no format that was asked for (data.*.format: {format}). Expected {wanted}.")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "(none)"


def _ends(value: Any, width: int = 100) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).split())
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
