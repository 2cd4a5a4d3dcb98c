"""Advice: something for every set of answers, and what it says of objective, data, reference and command is so."""

import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest

from jaxpo import arguments, config_file, dialogue, launch
from jaxpo.advise import Answers, Data, Goal, advise, without_effect
from jaxpo.config import Run
from jaxpo.config_checks import check
from jaxpo.data import formats
from jaxpo.data.files import Where
from jaxpo.data.readers import Preference
from jaxpo.data.record import Record
from jaxpo.recipes import Pick

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [field.name for field in fields(Answers) if field.type is bool]
PLAIN = [Answers(data=data, goal=goal) for data, goal in product(get_args(Data), get_args(Goal))]


def every() -> Iterator[Answers]:
    for plain, values in product(PLAIN, product([False, True], repeat=len(FLAGS))):
        yield replace(plain, **dict(zip(FLAGS, values, strict=True)))


@cache
def loaded(command: str) -> Run:
    """The run that a command of the advice describes."""
    python, module, name, verb, config, *overrides = shlex.split(command.replace("\\\n", " "))
    assert (python, module, name, verb) == ("python", "-m", "jaxpo.launch", "train")
    return config_file.load(ROOT / config, overrides)


def picks(answers: Answers) -> tuple[Pick, ...]:
    advice = advise(answers)
    return (*advice.picks, *advice.others)


ANSWER, OTHER = [{"role": "assistant", "content": "Gladly."}], [{"role": "assistant", "content": "No."}]
COLUMNS: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "May I return it?"}],
    "chosen": ANSWER,
    "rejected": OTHER,
    "chosen_probability": 0.8,
    "chosen_score": 7.0,
    "rejected_score": 5.0,
    "completion": ANSWER,
    "label": True,
    "completions": [ANSWER, OTHER],
    "scores": [7.0, 5.0],
}


def row(columns: str) -> dict[str, Any]:
    """A row with the columns that a recommendation names, the first of its alternatives."""
    first = columns.partition(";")[0]
    names = [part.split()[0] for part in first.partition(" (")[0].split(", ")]
    named = {name: COLUMNS[name] for name in names}
    if "probability from" in first:
        named["label"] = 0.7
    return named


def test_every_set_of_answers_gets_a_recommendation():
    sets = list(every())
    assert len(sets) == 2 * 5 * 2**9
    for answers in sets:
        advice = advise(answers)
        assert advice.main in advice.picks
        assert (advice.main.objective == "reward") == (answers.goal == "scorer")


def test_configs_exist_and_commands_make_the_run_that_is_promised():
    seen = {pick for answers in every() for pick in picks(answers)}
    assert len(seen) > 50
    for pick in seen:
        assert (ROOT / pick.path).is_file()
        run = loaded(pick.command)
        assert check(run) == []
        assert run.objective.name == pick.objective
        assert run.objective.uses_reference == pick.reference
        assert str(run.output_dir) == pick.output


def test_the_columns_are_what_the_objective_needs_and_can_use():
    for pick in {pick for answers in every() for pick in picks(answers) if pick.rows is not None}:
        objective = loaded(pick.command).objective
        record = Record(Where("row ", 1), row(pick.columns))
        reading = formats.detect(record, "auto", objective.feedback, objective.num_completions)
        found = formats.parse(record, reading, objective.num_completions)
        for one in found:
            assert isinstance(one, Preference)
            assert one.label in (0.0, 1.0) or objective.uses_labels, pick
            assert one.scores is not None or not objective.uses_scores, pick


def test_the_rows_that_one_has_are_the_rows_that_are_asked_for():
    for answers in every():
        main = advise(answers).main
        if answers.goal == "policy":
            wanted = {"prompts": "lists", "rankings": "lists"}.get(answers.data, answers.data)
            assert main.rows == wanted
        else:
            assert main.rows == ("lists" if answers.data == "rankings" else "pairs")


def test_a_tight_memory_gets_no_reference_or_the_reason_why_it_must():
    for answers in every():
        if answers.tight and answers.goal == "policy":
            advice = advise(answers)
            assert not advice.main.reference or any("reference" in n and "without" in n for n in advice.notes), answers


def test_soft_judgements_are_used_where_they_can_be():
    for answers in every():
        if answers.goal == "policy" and answers.data == "pairs" and not answers.weak_chosen:
            objective = loaded(advise(answers).main.command).objective
            assert objective.uses_labels or not answers.probabilities, answers
            assert objective.uses_scores == (answers.scores and not answers.probabilities), answers


def test_a_base_model_is_tuned_first_or_by_the_same_run():
    for answers in every():
        if answers.base_model and answers.goal == "policy":
            names = [pick.objective for pick in advise(answers).picks]
            assert names[0] == "sft" or names[0] in ("orpo", "cpo")
            if len(names) > 1 and names[0] == "sft":
                assert advise(answers).main.model == "runs/sft/export"


def test_prompts_alone_are_no_dead_end():
    for answers in every():
        if answers.data == "prompts" and answers.goal == "policy":
            said = dialogue.text(answers, 100)
            assert "online" in said
            assert "jaxpo.launch score" in said
            assert ("configs/reward-" in said) == (not answers.reward)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_answer_makes_a_difference_for_most_kinds_of_data(flag: str):
    kinds = [p.data for p in PLAIN if p.goal == "policy" and advise(p) != advise(replace(p, **{flag: True}))]
    assert len(kinds) >= 3


@pytest.mark.parametrize(
    ("answers", "objective", "config"),
    [
        (Answers("pairs"), "dpo", "dpo-smollm2-hh"),
        (Answers("pairs", noisy=True), "dpo", "cdpo-smollm2-hh"),
        (Answers("pairs", scores=True), "dpo", "dpo-soft-qwen2.5-ultrafeedback"),
        (Answers("pairs", wordy=True), "dpo_norm", "dpo-norm-qwen2.5-ultrafeedback"),
        (Answers("pairs", exact=True), "dpo", "rpo-qwen2.5-ultrafeedback"),
        (Answers("pairs", tight=True), "simpo", "simpo-qwen2.5-ultrafeedback"),
        (Answers("pairs", tight=True, base_model=True), "orpo", "orpo-qwen2.5-ultrafeedback"),
        (Answers("pairs", weak_chosen=True), "apo_down", "apo-zero-qwen2.5-ultrafeedback"),
        (Answers("labels"), "kto", "kto-qwen2.5-kto-mix"),
        (Answers("labels", tight=True), "bco", "bco-qwen2.5-kto-mix"),
        (Answers("rankings"), "plackett_luce", "plackett-luce-qwen2.5-ultrafeedback"),
        (Answers("rankings", noisy=True), "all_pairs", "all-pairs-qwen2.5-ultrafeedback"),
        (Answers("demonstrations"), "sft", "sft-smollm2-smoltalk"),
        (Answers("prompts", reward=True), "all_pairs", "all-pairs-qwen2.5-ultrafeedback"),
        (Answers("pairs", goal="scorer"), "reward", "reward-qwen2.5-helpsteer3"),
    ],
    ids=str,
)
def test_what_is_recommended(answers: Answers, objective: str, config: str):
    main = advise(answers).main
    assert (main.objective, main.config) == (objective, config)


def test_pieces_are_put_together():
    objective: Any = loaded(
        advise(Answers("pairs", noisy=True, wordy=True, exact=True, scores=True)).main.command
    ).objective
    assert objective.name == "dpo_norm"
    assert objective.label_smoothing == 0.1
    assert [modifier.name for modifier in objective.modifiers] == ["nll", "score_labels"]


def test_the_text_fits_the_terminal_but_for_what_is_to_be_copied():
    for answers in PLAIN:
        for line in dialogue.text(replace(answers, noisy=True, reward=True, base_model=True), 80).splitlines():
            assert len(line) <= 80 or line.startswith("   "), line


# The command line.


def answered(monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[str]:
    """Someone at a terminal who types these lines; the texts that they are shown."""
    shown: list[str] = []
    left = list(lines)

    def ask(text: str) -> str:
        shown.append(text)
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    return shown


def test_a_dialogue_ends_with_advice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    shown = answered(monkeypatch, "", "seven", "2", "n", "maybe", "Y", *[""] * 20)
    assert launch.main(["advise"]) == 0
    out = capsys.readouterr().out
    expected = Answers("labels", noisy=True)
    assert out.strip().replace("\n   ", "\n") == dialogue.text(expected, 80).strip().replace("\n   ", "\n")
    # What was not understood is asked again, and why; every question but those is asked once.
    assert len(shown) == 2 + 1 + len(dialogue.QUESTIONS) + 1
    again = [text.splitlines()[0] for text in shown if "not understood" in text]
    assert again == [
        "'seven' is not understood; expected a number from 1 to 5.",
        "'maybe' is not understood; expected y or n.",
    ]


def test_a_dialogue_asks_only_what_matters():
    asked: list[str] = []

    def ask(text: str) -> str:
        asked.append(text)
        return "4" if "row of your data" in text else ""

    assert dialogue.dialogue(ask) == Answers("demonstrations")
    assert len(asked) == 3


def test_the_end_of_input_is_an_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    answered(monkeypatch, "1")
    assert launch.main(["advise"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_flags_say_the_same_as_the_dialogue(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "90")
    for name, (field, _) in arguments.SITUATION.items():
        assert launch.main(["advise", "--pairs", f"--{name}"]) == 0
        assert capsys.readouterr().out == dialogue.text(replace(Answers("pairs"), **{field: True}), 90) + "\n"
    assert launch.main(["advise", "--rankings", "--reward-model"]) == 0
    assert capsys.readouterr().out == dialogue.text(Answers("rankings", goal="scorer"), 90) + "\n"
    assert {field for field, _ in arguments.SITUATION.values()} == set(FLAGS) == {q.field for q in dialogue.QUESTIONS}
    assert set(arguments.ROWS) == set(get_args(Data)) == set(dialogue.DATA.values())


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("--labels --noisy", "--noisy has no effect with --labels; leave it out."),
        ("--labels --noisy --judge", "--noisy has no effect with --labels --judge; leave it out."),
        ("--prompts --scores", "--scores has no effect with --prompts; leave it out."),
        (
            "--demonstrations --noisy --probabilities --scores --length-bias --right-or-wrong",
            "--noisy, --probabilities, --scores, --length-bias, --right-or-wrong have no effect with "
            "--demonstrations; leave them out.",
        ),
        (
            "--labels --reward-model --base-model --tight",
            "--base-model has no effect with --labels --reward-model --tight; leave it out.",
        ),
    ],
)
def test_a_flag_that_changes_nothing_is_refused(said: str, expected: str, capsys: pytest.CaptureFixture[str]):
    assert launch.main(["advise", *said.split()]) == 2
    assert capsys.readouterr() == ("", f"error: {expected}\n")


def test_flags_without_effect_are_those_without_which_the_advice_is_the_same():
    for answers in every():
        idle = without_effect(answers)
        assert advise(replace(answers, **dict.fromkeys(idle, False))) == advise(answers)
        if idle == ():
            for name in (name for name in FLAGS if vars(answers)[name]):
                assert advise(replace(answers, **{name: False})) != advise(answers), (name, answers)
    # On it depends with which losses noise is borne.
    assert without_effect(Answers("labels", noisy=True)) == ("noisy",)
    assert without_effect(Answers("labels", noisy=True, tight=True)) == ()


@pytest.mark.parametrize("arguments", [[], ["--noisy"], ["--reward-model"], ["--pairs", "--labels"]])
def test_without_a_terminal_or_without_the_data_it_prints_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(SystemExit) as stop:
        launch.main(["advise", *arguments])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: ")
    assert "--pairs" in err
