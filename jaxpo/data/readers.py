"""Readers: the columns of a row of each format as a prompt with its answers, and what the row says of them."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from jaxpo.data.record import Message, Record, Said, shown
from jaxpo.errors import UserError

# A column of these marks binary feedback: an answer in such a row may be a bad one.
LABELS = frozenset({"label", "kto_tag"})
SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
MARGIN = "margin"
PROBABILITY = "chosen_probability"
# What a row may say of a pair beside it, and every column that judges answers.
OF_PAIRS = frozenset({name for names in SCORES for name in names} | {MARGIN, PROBABILITY})
JUDGEMENTS = LABELS | OF_PAIRS | {"labels", "scores"}
# What a row may say to the chat template.
RENDERED = frozenset({"tools", "chat_template_kwargs"})

_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """A prompt with its completions, the best one first: all plain text, or all lists of messages.

    `template_kwargs` go to the chat template: the row's `tools` and `chat_template_kwargs`. label, scores: as in
    `jaxpo.batch.Example`, scores None where the row has none. part: as in `jaxpo.data.files.Where`.
    """

    prompt: Said
    completions: tuple[Said, ...]
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    label: float = 1.0
    scores: tuple[float, ...] | None = None
    part: str = ""


class UnusableError(Exception):
    """Carries a drop reason up to `formats.parse`."""


# A reader takes a row and how many answers are wanted of it, and gives the best of them, the best one first.


def pairs(record: Record, n: int) -> Preference:
    columns = ("chosen", "rejected")[:n]
    return _after_prompt(record, record.said("prompt"), [record.said(column) for column in columns])


def transcripts(record: Record, n: int) -> Preference:
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


def helpsteer3(record: Record, n: int) -> Preference:
    preferred = record.number("overall_preference")
    if preferred == 0:
        raise UnusableError("tie")
    answers = [_as_answer(record.said("response1")), _as_answer(record.said("response2"))]
    # Negative: the first response is the better one.
    ordered = answers if preferred < 0 else answers[::-1]
    context = record.said("context")
    prompt = [{"role": "user", "content": context}] if isinstance(context, str) else context
    return Preference(prompt, tuple(ordered[:n]), record.template_kwargs())


def conversation_pairs(record: Record, n: int) -> Preference:
    answers = tuple(_as_answer(record.said(column)) for column in ("chosen", "rejected")[:n])
    return Preference(_with_system(record, record.turns("conversations")), answers, record.template_kwargs())


def conversation(record: Record, n: int) -> Preference:
    return _last_turn(_with_system(record, record.turns("conversations")), record)


def alpaca_pairs(record: Record, n: int) -> Preference:
    answers = tuple(_as_answer(record.said(column)) for column in ("chosen", "rejected")[:n])
    return Preference(_alpaca_prompt(record), answers, record.template_kwargs())


def alpaca(record: Record, n: int) -> Preference:
    return Preference(_alpaca_prompt(record), (_as_answer(record.text("output")),), record.template_kwargs())


def completion(record: Record, n: int) -> Preference:
    prompt, answer = record.said("prompt"), record.said("completion")
    kwargs = record.template_kwargs()
    if isinstance(prompt, str) and isinstance(answer, str):
        return Preference(prompt, (answer,), kwargs)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Preference(turns, (_after(turns, _as_answer(answer)),), kwargs)


def messages(record: Record, n: int) -> Preference:
    return _last_turn(record.turns("messages"), record)


def text(record: Record, n: int) -> Preference:
    return Preference("", (record.text("text"),))


def ranking(record: Record, n: int) -> Preference:
    """Answers in the order of their scores, or as listed where there are none. Of a list for one, the first of them."""
    answers = record.answers("completions")
    scores = record.numbers("scores") if "scores" in record.columns() else None
    if scores is not None:
        _check_as_many(record, "scores", len(scores), len(answers))
        order = sorted(range(len(answers)), key=scores.__getitem__, reverse=True)
        answers, scores = [answers[i] for i in order], [scores[i] for i in order]
    if len(answers) < min(n, 2):
        raise UnusableError("too_few_answers")
    if n == 1:
        return _after_prompt(record, record.said("prompt"), answers[:1])
    if len(answers) > n:
        raise UnusableError("over_max_completions")
    if scores is not None and len(set(scores)) < len(scores):
        raise UnusableError("tie")
    read = _after_prompt(record, record.said("prompt"), answers)
    return read if scores is None else replace(read, scores=tuple(scores))


def answer_list(record: Record, n: int) -> Preference:
    """Answers with a label each, in no order, however many."""
    listed = record.answers("completions")
    if not listed:
        raise UnusableError("too_few_answers")
    return _after_prompt(record, record.said("prompt"), listed)


def judgement(record: Record) -> tuple[float, tuple[float, ...] | None]:
    """The probability that the chosen answer of a pair is the better one, and the answers' ratings.

    Scores that do not tell the answers apart, or tell the opposite, leave no preference to learn from.
    """
    columns = record.columns()
    for chosen, rejected in SCORES:
        if len(found := {chosen, rejected} & columns) == 1:
            raise UserError(f"{record.where} has {found.pop()} but not both of {chosen} and {rejected}.")
    rated = [names for names in (*SCORES, (MARGIN,)) if names[0] in columns]
    if len(rated) > 1:
        raise UserError(
            f"{record.where} says more than once how far apart the answers are, in "
            f"{' and in '.join('/'.join(names) for names in rated)}. Expected one of them."
        )
    label = record.probability(PROBABILITY) if PROBABILITY in columns else 1.0
    if not rated:
        return label, None
    scores = tuple(record.number(name) for name in rated[0])
    # A margin of 0 asks the loss for none; equal scores say that the answers are equally good.
    if len(scores) == 2 and scores[0] == scores[1]:
        raise UnusableError("tie")
    best, worst = scores if len(scores) == 2 else (scores[0], 0.0)
    if best < worst:
        raise UnusableError("scores_contradict")
    return label, (best, worst)


def labels_of(record: Record, listed: bool, count: int) -> list[float]:
    """The label of each of a row's `count` answers: column `labels` where they are listed, else the row's one."""
    if listed:
        labels = record.labels("labels")
        _check_as_many(record, "labels", len(labels), count)
        return labels
    named = sorted(LABELS & record.columns())
    if len(named) > 1:
        raise UserError(
            f"{record.where} has two columns that say if the answer is desirable, {' and '.join(named)}. Expected one "
            "of them."
        )
    return [record.label(named[0])]


def _check_as_many(record: Record, column: str, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(
            f"{record.where}: column {column} has {found} entries and column completions {expected}, expected one for "
            "each completion."
        )


def _after_prompt(record: Record, prompt: Said, answers: list[Said]) -> Preference:
    """Answers to a prompt in a column of its own: text to text, a message to messages, or whole conversations."""
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
        raise UnusableError("prompts_differ")
    return Preference(shared, rests, kwargs)


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


def _last_turn(turns: list[Message], record: Record) -> Preference:
    if turns[-1]["role"] != "assistant":
        raise UnusableError("answer_not_assistant")
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
        raise UnusableError("equal_answers")
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
        raise UnusableError("prompts_differ")
    return conversations[0][:shared], rests


def _split_text(chosen: str, rejected: str) -> tuple[str, tuple[str, str]]:
    """The characters both begin with, as TRL's extract_prompt: a space before the difference goes to the answers."""
    if chosen == rejected:
        raise UnusableError("equal_answers")
    end = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if end is None:
        raise UnusableError("empty_answer")
    if end and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end], (chosen[end:], rejected[end:])


def _is_hh(text: str) -> bool:
    return _HH_TURN.match(text) is not None


def _hh_turns(text: str) -> list[Message]:
    parts = _HH_TURN.split(text)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": _HH_ROLES[who], "content": said.strip()} for who, said in pairs]


def _same_text(prompt: str, content: str) -> bool:
    a, b = prompt.strip(), content.strip()
    return bool(a and b) and (a in b or b in a)
