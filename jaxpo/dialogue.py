"""The `advise` command: a short dialogue on a terminal, and advice as text."""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, get_args

from jaxpo.advise import Advice, Answers, Data, Goal, advise
from jaxpo.recipes import Pick

Ask = Callable[[str], str]
T = TypeVar("T")

GOALS: dict[str, Goal] = {
    "a better model": "policy",
    "a reward model, to rate answers with": "scorer",
}
DATA: dict[str, Data] = {
    "two answers, and which one is better": "pairs",
    "one answer, and whether it is good (a thumb up or down)": "labels",
    "several answers, in order or with ratings": "rankings",
    "one good answer": "demonstrations",
    "a prompt, and no answer": "prompts",
}


@dataclass(frozen=True)
class Question:
    """A question to be answered with yes or no, the field of `Answers` it is for, and the data it makes sense for."""

    field: str
    text: str
    data: frozenset[Data]
    of_scorer: bool = False


ANY: frozenset[Data] = frozenset(get_args(Data))
JUDGED: frozenset[Data] = ANY - {"demonstrations", "prompts"}
JUDGEABLE: frozenset[Data] = ANY - {"demonstrations"}
QUESTIONS = (
    Question("base_model", "Is your model a base model, never tuned to answer?", ANY),
    Question("noisy", "Are many judgements wrong or disputed, one in ten or more?", JUDGED, True),
    Question("probabilities", "Do rows say how sure a judgement is (a share of the judges)?", JUDGED, True),
    Question("scores", "Do rows rate the answers with numbers?", JUDGED, True),
    Question("wordy", "Are the better answers mostly the longer ones?", JUDGEABLE),
    Question("exact", "Are answers right or wrong (mathematics, code, tool calls)?", JUDGEABLE),
    Question("weak_chosen", "Does your model write better answers than the good ones of the data?", JUDGED),
    Question("tight", "Is there too little memory or time for a pass of a reference model?", JUDGEABLE),
    Question("reward", "Have you a reward model, or a program that judges answers?", JUDGEABLE),
)


def dialogue(ask: Ask) -> Answers:
    """Ask what matters; an empty answer is the first choice, or no. `ask` prints a text and returns a line."""
    goal = _choose(ask, "What do you want?", GOALS)
    data = _choose(ask, "What does a row of your data hold?", DATA)
    given = {
        question.field: _yes(ask, question.text)
        for question in QUESTIONS
        if data in question.data and (question.of_scorer or goal == "policy")
    }
    return Answers(data=data, goal=goal, **given)


def _choose(ask: Ask, text: str, choices: dict[str, T]) -> T:
    listed = "".join(f"\n  {n}  {name}" for n, name in enumerate(choices, 1))
    numbers = {str(n): value for n, value in enumerate(choices.values(), 1)}
    return _understood(
        ask, f"{text}{listed}\n1-{len(choices)} [1]: ", numbers, "1", f"a number from 1 to {len(choices)}"
    )


def _yes(ask: Ask, text: str) -> bool:
    return _understood(ask, f"{text} [y/N]: ", {"y": True, "yes": True, "n": False, "no": False}, "n", "y or n")


def _understood(ask: Ask, text: str, meanings: dict[str, T], default: str, expected: str) -> T:
    """What an answer means; asked again, with what was expected, until it is one that means something."""
    complaint = ""
    while (said := ask(f"{complaint}{text}").strip().lower() or default) not in meanings:
        complaint = f"{said!r} is not understood; expected {expected}.\n"
    return meanings[said]


def text(answers: Answers, width: int) -> str:
    """The advice for some answers, broken at a width; commands are never broken but at their backslashes."""
    return "\n".join(_lines(advise(answers), width))


def _lines(advice: Advice, width: int) -> Iterator[str]:
    for number, step in enumerate(advice.steps, 1):
        if number > 1:
            yield ""
        yield _filled(step.text, width, f"{number}. ")
        if step.command is not None:
            yield f"\n   {step.command}"
        if step.pick is not None:
            yield from _pick(step.pick, width)
    if advice.others:
        yield "\nElse:"
        for other in advice.others:
            start = " ".join((other.path, *other.overrides))
            yield _filled(f"{start} ({other.objective}): {other.why}", width, "- ")
    if advice.notes:
        yield "\nNote:"
        yield from (_filled(note, width, "- ") for note in advice.notes)


def _pick(pick: Pick, width: int) -> Iterator[str]:
    yield _filled(f"{pick.objective}. {pick.why}", width, "   objective  ")
    yield _filled(pick.columns, width, "   columns    ")
    yield _filled("yes" if pick.reference else "none", width, "   reference  ")
    yield _filled(pick.path, width, "   config     ")
    yield textwrap.indent(f"\n{pick.command}", "   ")


def _filled(said: str, width: int, head: str) -> str:
    return textwrap.fill(
        said,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
