"""What rows say of their answers, read for each kind of feedback: labels, scores, rankings, pairs as any of them."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpo.batch import Feedback
from jaxpo.data.files import Where
from jaxpo.data.formats import OBJECTIVES, SERVES, SHAPES, Drop, detect, parse
from jaxpo.data.readers import Preference
from jaxpo.data.record import Record
from jaxpo.errors import UserError

U, A = "user", "assistant"


def say(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def read(row: dict[str, Any], feedback: Feedback, n: int = 1, format: str = "auto") -> list[Preference | Drop]:
    record = Record(Where("rows.jsonl:", 7), row)
    return parse(record, detect(record, format, feedback, n), n)


def reasons(parsed: list[Preference | Drop]) -> list[tuple[str, str]]:
    assert all(isinstance(one, Drop) for one in parsed)
    return [(str(one.where), one.reason) for one in parsed if isinstance(one, Drop)]


PAIR = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}
LIST = {"prompt": "2+2=", "completions": [" 4", " four", " 5"]}
ANSWER = {"prompt": "2+2=", "completion": " 4"}


# Labels.

HELLO = Preference(say((U, "Hi")), (say((A, "Hello!")),))
LABELLED = {
    "text": (ANSWER, Preference("2+2=", (" 4",))),
    "prompt and completion as messages": (
        {"prompt": say((U, "Hi")), "completion": say((A, "Hello!"))},
        HELLO,
    ),
    "messages": ({"messages": say((U, "Hi"), (A, "Hello!"))}, HELLO),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        HELLO,
    ),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello!"}, HELLO),
}


@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize(("said", "label"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (0.25, 0.25), (0.5, 0.5)])
@pytest.mark.parametrize("name", LABELLED)
def test_a_labelled_answer(name: str, column: str, said: Any, label: float) -> None:
    row, expected = LABELLED[name]
    (got,) = read({**row, column: said}, "label")
    assert got == Preference(expected.prompt, expected.completions, label=label)
    assert detect(Record(Where("", 1), {**row, column: said}), "labels", "label", 1).format == "labels"


@pytest.mark.parametrize("said", ["True", "1", "", 1.5, -0.5, 2, [], {}, float("nan"), float("inf"), 10**400])
def test_a_label_is_a_probability_or_a_truth_value(said: Any) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:7: column label is .*, expected true or false, 1 or 0, or a pro"):
        read({**ANSWER, "label": said}, "label")


def test_a_later_row_without_its_label() -> None:
    reading = detect(Record(Where("a:", 1), {**ANSWER, "label": 1}), "auto", "label", 1)
    for row in (ANSWER, {**ANSWER, "label": None}):
        with pytest.raises(
            UserError, match=r"a:2 has the columns completion, prompt.* labels: completion, prompt, lab"
        ):
            parse(Record(Where("a:", 2), row), reading, 1)
    # The other name of the column will do.
    assert parse(Record(Where("a:", 3), {**ANSWER, "kto_tag": 0}), reading, 1) == [
        Preference("2+2=", (" 4",), label=0.0)
    ]


def test_two_labels_for_one_answer() -> None:
    with pytest.raises(
        UserError, match=r"rows\.jsonl:7 has two columns that say .*, kto_tag and label\. Expected one of them\."
    ):
        read({**ANSWER, "label": True, "kto_tag": True}, "label")


def test_answers_listed_with_a_label_each_become_examples_of_their_own() -> None:
    row = {"prompt": say((U, "Hi")), "completions": ["Hello!", say((A, "What?"))], "labels": [True, 0.25]}
    assert read(row, "label") == [
        Preference(say((U, "Hi")), (say((A, "Hello!")),), label=1.0, part=" (answer 1)"),
        Preference(say((U, "Hi")), (say((A, "What?")),), label=0.25, part=" (answer 2)"),
    ]


def test_of_listed_answers_only_the_unusable_ones_are_dropped() -> None:
    parsed = read({"prompt": "p", "completions": ["a", " ", "a"], "labels": [1, 0, 0.5]}, "label")
    assert [one.label for one in parsed if isinstance(one, Preference)] == [1.0, 0.5]
    assert reasons(parsed[1:2]) == [("rows.jsonl:7 (answer 2)", "empty_answer")]
    nothing = read({"prompt": "p", "completions": [], "labels": []}, "label")
    assert reasons(nothing) == [("rows.jsonl:7", "too_few_answers")]
    unasked = read({"prompt": " ", "completions": ["a", "b"], "labels": [1, 0]}, "label")
    assert reasons(unasked) == [("rows.jsonl:7", "empty_prompt")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1]}, "column labels has 1 entries and column completions 3, expected one for each completion"),
        ({"labels": [1, 0, 1, 0]}, "column labels has 4 entries and column completions 3"),
        ({"labels": True}, "column labels is True, expected a list of labels"),
        ({"labels": [1, "no", 0]}, r"column labels\[1\] is 'no', expected true or false"),
        ({"labels": [1, None, 0]}, r"column labels\[1\] is None, expected true or false"),
        ({"completions": "4"}, "column completions is '4', expected a list of answers"),
        ({"completions": ["4", 5, "6"]}, r"column completions\[1\] is 5, expected a string or a list of mess"),
        ({"completions": ["4", "\ud800", "6"]}, r"completions\[1\] holds half of a surrogate pair"),
    ],
)
def test_lists_of_labels_that_cannot_be_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:7: {message}"):
        read({**LIST, "labels": [1, 0, 1], **change}, "label")


def test_a_pair_is_two_labelled_answers() -> None:
    assert read(PAIR, "label") == [
        Preference("2+2=", (" 4",), label=1.0, part=" (chosen)"),
        Preference("2+2=", (" 5",), label=0.0, part=" (rejected)"),
    ]
    soft = read({**PAIR, "chosen_probability": 0.75, "margin": 2}, "label")
    assert [(one.label, one.scores) for one in soft if isinstance(one, Preference)] == [(0.75, None), (0.25, None)]
    hh = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
    assert [one.part for one in read(hh, "label") if isinstance(one, Preference)] == [" (chosen)", " (rejected)"]


def test_of_a_pair_read_as_two_answers_one_may_be_dropped() -> None:
    kept, dropped = read({**PAIR, "rejected": " "}, "label")
    assert isinstance(kept, Preference) and kept.label == 1.0
    assert reasons([dropped]) == [("rows.jsonl:7 (rejected)", "empty_answer")]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("equal_answers", {"rejected": " 4"}),
        ("tie", {"chosen_score": 1, "rejected_score": 1}),
        ("scores_contradict", {"chosen_score": 1, "rejected_score": 2}),
        ("empty_prompt", {"prompt": ""}),
    ],
)
def test_a_pair_that_says_nothing_gives_no_labelled_answers(reason: str, change: dict[str, Any]) -> None:
    assert reasons(read({**PAIR, **change}, "label")) == [("rows.jsonl:7", reason)]


# Pairs.


@pytest.mark.parametrize("feedback", ["pair", "ranking"])
@pytest.mark.parametrize("probability", [0, 0.25, 0.5, 1, 1.0])
def test_the_probability_of_a_pair_is_its_label(feedback: Feedback, probability: float) -> None:
    (got,) = read({**PAIR, "chosen_probability": probability}, feedback, 2)
    assert got == Preference("2+2=", (" 4", " 5"), label=float(probability))


@pytest.mark.parametrize("said", [1.01, -0.1, True, "0.5", float("nan"), [], 10**400])
def test_a_probability_lies_between_0_and_1(said: Any) -> None:
    with pytest.raises(
        UserError, match=r"rows\.jsonl:7: column chosen_probability is .*, expected a probability, from"
    ):
        read({**PAIR, "chosen_probability": said}, "pair", 2)


@pytest.mark.parametrize("feedback", ["pair", "ranking"])
@pytest.mark.parametrize(
    ("columns", "scores"),
    [
        ({"chosen_score": 9, "rejected_score": -2.5}, (9.0, -2.5)),
        ({"score_chosen": 9, "score_rejected": 1}, (9.0, 1.0)),
        ({"margin": 2.5}, (2.5, 0.0)),
        ({"margin": 0}, (0.0, 0.0)),
        ({"chosen_score": 1e6, "rejected_score": -1e6}, (1e6, -1e6)),
        ({"margin": None}, None),
    ],
)
def test_ratings(feedback: Feedback, columns: dict[str, Any], scores: tuple[float, float] | None) -> None:
    (got,) = read({**PAIR, **columns}, feedback, 2)
    assert got == Preference("2+2=", (" 4", " 5"), scores=scores)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"margin": 1, "chosen_score": 2, "rejected_score": 1},
            r"rows\.jsonl:7 says more than once how far apart the answers are, in chosen_score/rejected_score and in m",
        ),
        (
            {"score_chosen": 2, "score_rejected": 1, "chosen_score": 2, "rejected_score": 1},
            "in chosen_score/rejected_score and in score_chosen/score_rejected",
        ),
        ({"margin": "large"}, r"rows\.jsonl:7: column margin is 'large', expected a number"),
        ({"margin": True}, "column margin is True, expected a number"),
        ({"margin": 1e38}, r"column margin is 1e\+38, expected a number from -1,000,000 to 1,000,000"),
        ({"margin": 1_000_001}, "column margin is 1000001, expected a number from"),
        ({"margin": 10**400}, "column margin is 1000.*, expected a number from"),
        (
            {"chosen_score": 1, "rejected_score": -3.4e38},
            r"column rejected_score is -3\.4e\+38, expected a number from",
        ),
        ({"margin": float("nan")}, "column margin is nan, expected a number"),
    ],
)
def test_ratings_that_cannot_be_read(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read({**PAIR, **columns}, "pair", 2)


def test_a_margin_below_zero_contradicts() -> None:
    assert reasons(read({**PAIR, "margin": -1}, "pair", 2)) == [("rows.jsonl:7", "scores_contradict")]


def test_judgements_do_not_matter_to_supervised_training() -> None:
    row = {**PAIR, "chosen_probability": 0.1, "margin": -1}
    assert read(row, "completion") == [Preference("2+2=", (" 4",))]


# Rankings.


def test_a_ranking_is_in_the_order_of_the_list() -> None:
    assert read(LIST, "ranking", 4) == [Preference("2+2=", (" 4", " four", " 5"))]
    assert read({**LIST, "scores": None}, "ranking", 3) == [Preference("2+2=", (" 4", " four", " 5"))]
    chat = {"prompt": "Hi", "completions": [say((A, "Hello!")), say((A, "What?"))[0]]}
    assert read(chat, "ranking", 2) == [Preference(say((U, "Hi")), (say((A, "Hello!")), say((A, "What?"))))]
    whole = {"prompt": "Hi", "completions": [say((U, "Hi"), (A, text)) for text in ("Hello!", "Hm.", "What?")]}
    assert read(whole, "ranking", 3) == [
        Preference(say((U, "Hi")), (say((A, "Hello!")), say((A, "Hm.")), say((A, "What?"))))
    ]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=6, unique=True))
def test_scores_decide_the_order(scores: list[float]) -> None:
    answers = [f"answer {i}" for i in range(len(scores))]
    (got,) = read({"prompt": "p", "completions": answers, "scores": scores}, "ranking", 6)
    assert isinstance(got, Preference) and got.scores is not None
    assert list(got.scores) == sorted(scores, reverse=True)
    assert [scores[answers.index(str(answer))] for answer in got.completions] == list(got.scores)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("over_max_completions", {"completions": ["a", "b", "c", "d"]}),
        ("too_few_answers", {"completions": ["a"]}),
        ("too_few_answers", {"completions": []}),
        ("equal_answers", {"completions": ["a", "b", "a "]}),
        ("equal_answers", {"completions": ["a", "b", "b"]}),
        ("empty_answer", {"completions": ["a", "", "b"]}),
        ("empty_prompt", {"prompt": " "}),
        ("tie", {"scores": [3, 1, 3]}),
        ("tie", {"scores": [0, 1, -0.0]}),
    ],
)
def test_rankings_that_say_nothing_are_dropped(reason: str, change: dict[str, Any]) -> None:
    assert reasons(read({**LIST, **change}, "ranking", 3)) == [("rows.jsonl:7", reason)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1, 2]}, "column scores has 2 entries and column completions 3, expected one for each completion"),
        ({"scores": 1}, "column scores is 1, expected a list of numbers"),
        ({"scores": [1, "2", 3]}, r"column scores\[1\] is '2', expected a number"),
        ({"scores": [1, 2, float("inf")]}, r"column scores\[2\] is inf, expected a number from"),
        ({"scores": [1, 2, -1e7]}, r"column scores\[2\] is -10000000\.0, expected a number from"),
        ({"completions": " 4"}, "column completions is ' 4', expected a list of answers"),
        ({"completions": {"a": 1}}, r"column completions is dict \{'a': 1\}, expected a list of answers"),
        ({"completions": [" 4", None]}, r"column completions\[1\] is None, expected a string or a list of mess"),
    ],
)
def test_rankings_that_cannot_be_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:7: {message}"):
        read({**LIST, **change}, "ranking", 3)


def test_a_pair_is_a_ranking_of_two() -> None:
    assert read(PAIR, "ranking", 4) == [Preference("2+2=", (" 4", " 5"))]
    assert read({**PAIR, "score_chosen": 3, "score_rejected": 1}, "ranking", 4) == [
        Preference("2+2=", (" 4", " 5"), scores=(3.0, 1.0))
    ]


def test_of_a_ranking_supervised_training_takes_the_best() -> None:
    assert read(LIST, "completion") == [Preference("2+2=", (" 4",))]
    assert read({**LIST, "scores": [1, 3, 3]}, "completion") == [Preference("2+2=", (" four",))]
    assert read({**LIST, "completions": [" 4"]}, "completion") == [Preference("2+2=", (" 4",))]


@pytest.mark.parametrize("feedback", ["ranking", "completion"])
@pytest.mark.parametrize("format", ["auto", "rankings"])
@pytest.mark.parametrize(
    ("first", "later", "message"),
    [
        ({"scores": [3, 2, 1]}, {}, "rows:2 has no column scores, but the first row of its source has scores"),
        ({"scores": [3, 2, 1]}, {"scores": None}, "rows:2 has null in its column scores, but the first row of its sou"),
        ({}, {"scores": [3, 2, 1]}, "rows:2 has a column scores, but the first row of its source has none"),
        ({"scores": None}, {"scores": [3, 2, 1]}, "rows:2 has a column scores, but the first row of its source has"),
    ],
)
def test_all_lists_of_a_source_have_scores_or_none_has(
    first: dict[str, Any], later: dict[str, Any], message: str, format: str, feedback: Feedback
) -> None:
    reading = detect(Record(Where("rows:", 1), {**LIST, **first}), format, feedback, 3)
    assert isinstance(parse(Record(Where("rows:", 3), {**LIST, **first}), reading, 3)[0], Preference)
    with pytest.raises(UserError, match=message):
        parse(Record(Where("rows:", 2), {**LIST, **later}), reading, 3)


# Columns that judge answers, beside answers that they cannot judge.


@pytest.mark.parametrize(
    ("row", "feedback", "column", "belongs"),
    [
        ({**LIST, "chosen_probability": 0.9}, "ranking", "chosen_probability", "pairs: chosen, prompt, rejected"),
        ({**LIST, "margin": 1}, "completion", "margin", "pairs: chosen, prompt, rejected"),
        ({**LIST, "label": True}, "ranking", "label", "labels: completion, prompt, label or kto_tag"),
        ({**LIST, "labels": [1, 0, 1], "scores": [3, 2, 1]}, "label", "scores", "rankings: completions, prompt"),
        ({**LIST, "labels": [1, 0, 1], "label": True}, "label", "label", "labels: completion, prompt, label or kto_t"),
        ({**ANSWER, "label": True, "labels": [True]}, "label", "labels", "labels: completions, labels, prompt"),
        ({**ANSWER, "label": True, "chosen_score": 3}, "label", "chosen_score", "pairs: chosen, prompt, rejected"),
        ({**ANSWER, "scores": [1]}, "completion", "scores", "rankings: completions, prompt"),
        ({**PAIR, "kto_tag": True}, "pair", "kto_tag", "labels: completion, prompt, label or kto_tag"),
        ({**PAIR, "scores": [2, 1]}, "pair", "scores", "rankings: completions, prompt"),
        ({**PAIR, "labels": [1, 0]}, "label", "labels", "labels: completions, labels, prompt"),
    ],
)
def test_a_judgement_that_the_row_has_no_use_for(
    row: dict[str, Any], feedback: Feedback, column: str, belongs: str
) -> None:
    without = {name: value for name, value in row.items() if name != column}
    reading = detect(Record(Where("rows.jsonl:", 7), without), "auto", feedback, 3)
    shown = (
        rf"rows\.jsonl:7 has a column {column}, which a row of format {reading.format} has no use for; it belongs to"
    )
    # In the first row, and in one after it.
    with pytest.raises(UserError, match=f"{shown} rows such as {belongs}.* Expected rows without it, or data"):
        read(row, feedback, 3)
    with pytest.raises(UserError, match=shown):
        parse(Record(Where("rows.jsonl:", 7), row), reading, 3)
    # With the format that the message names, and where it says nothing.
    expected = parse(Record(Where("rows.jsonl:", 7), without), reading, 3)
    assert read(row, feedback, 3, reading.format) == read({**row, column: None}, feedback, 3) == expected


@pytest.mark.parametrize("feedback", ["pair", "label", "ranking", "completion"])
def test_a_label_beside_a_pair_may_be_anything(feedback: Feedback) -> None:
    assert read({**PAIR, "label": "arithmetic"}, feedback, 2) == read(PAIR, feedback, 2)


# Which rows serve which feedback.


@pytest.mark.parametrize(
    ("row", "feedback", "message"),
    [
        (
            {**ANSWER, "label": 1},
            "completion",
            r"binary feedback.* kto, bco or .*To train on every answer.*data\.\*\.f",
        ),
        (
            {**ANSWER, "label": 1},
            "pair",
            r"binary feedback.* kto, bco or apo_zero_unpaired\. Expected one of these, or",
        ),
        (
            {**ANSWER, "kto_tag": 1},
            "ranking",
            r"binary feedback.*, or lists of answers \(columns prompt, completions\)",
        ),
        ({**LIST, "labels": [1, 0, 1]}, "completion", "binary feedback"),
        ({**LIST, "labels": [1, 0, 1]}, "ranking", "binary feedback"),
        (
            LIST,
            "pair",
            r"rankings, .* all_pairs, plackett_luce or reward\. Expected one of these, or preference d",
        ),
        (LIST, "label", "rankings, .* Expected one of these, or a column label beside the answer"),
        (ANSWER, "label", r"completions, one answer .* learns from whether an answer is desirable.* a column label"),
        (ANSWER, "ranking", r"completions, one answer to a prompt, but the objective compares 4 answers\. .*name sft"),
        (
            {"text": "t"},
            "label",
            r"text, one answer .* learns from whether an answer is desirable.*objective\.name sft",
        ),
    ],
)
def test_rows_for_another_objective_say_for_which(row: dict[str, Any], feedback: Feedback, message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:7 is of format .*{message}"):
        read(row, feedback, 4)


@pytest.mark.parametrize(
    ("row", "feedback", "message"),
    [
        ({**PAIR, **LIST}, "ranking", "can be read as pairs or rankings"),
        ({**PAIR, **LIST}, "completion", "can be read as pairs or rankings"),
        ({**PAIR, **ANSWER, "label": 1}, "label", r"can be read as labels or pairs .*data\.\*\.format"),
        ({**ANSWER, **LIST}, "completion", "can be read as completions or rankings"),
        (
            {**ANSWER, "messages": say((U, "a"), (A, "b")), "label": 1},
            "label",
            r"holds its answer twice, in the columns completion, prompt and in messages\. Expected one of the two",
        ),
    ],
)
def test_rows_that_can_be_read_in_two_ways(row: dict[str, Any], feedback: Feedback, message: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:7 {message}"):
        read(row, feedback, 3)


@pytest.mark.parametrize(
    ("row", "feedback", "format", "answers"),
    [
        ({**PAIR, **LIST}, "ranking", "rankings", 3),
        ({**PAIR, **LIST}, "ranking", "pairs", 2),
        ({**PAIR, **ANSWER, "label": 1}, "label", "labels", 1),
        ({**LIST, "labels": [1, 0, 1]}, "ranking", "rankings", 3),
        ({**ANSWER, "label": 0}, "completion", "completions", 1),
    ],
)
def test_a_named_format_decides(row: dict[str, Any], feedback: Feedback, format: str, answers: int) -> None:
    (got,) = read(row, feedback, 3 if feedback == "ranking" else 1, format)
    assert isinstance(got, Preference) and len(got.completions) == answers


def test_a_named_format_that_the_objective_cannot_use() -> None:
    with pytest.raises(UserError, match=r"is of format messages, one answer .* a column label beside the answer"):
        read({"messages": say((U, "a"), (A, "b")), "label": True}, "label", 1, "messages")
    with pytest.raises(
        UserError, match=r"data\.\*\.format: labels\)\. Expected labels: completion, prompt, label or kto"
    ):
        read(ANSWER, "label", 1, "labels")


def test_every_kind_of_feedback_is_served_and_named() -> None:
    kinds = set(get_args(Feedback))
    assert set(SERVES) == set(OBJECTIVES) == kinds == {shape.says for shape in SHAPES}
    assert all(kind in SERVES[kind] for kind in kinds)


def test_the_objectives_that_messages_name_are_there_and_learn_from_such_rows() -> None:
    from jaxpo.objectives import AnyObjective

    def members(union: Any) -> list[Any]:
        return [member for part in get_args(union) for member in members(part)] or [union]

    objectives = [one for one in members(get_args(AnyObjective)[0]) if isinstance(one, type)]
    feedback = {one.name: one.feedback for one in objectives}
    for kind, named in OBJECTIVES.items():
        listed = named.replace(",", "").split(" and the other ")[0].replace(" or ", " ").split()
        assert [feedback[name] for name in listed] == [kind] * len(listed)
        if " and the other " not in named:
            assert set(listed) == {name for name, of in feedback.items() if of == kind}


def test_solutions_to_gsm8k_as_lists_with_labels(shared: Path) -> None:
    with (shared / "data/gsm8k/example_model_solutions.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    listed = [
        {
            "prompt": row["question"],
            "completions": [row[model]["solution"] for model in models],
            "labels": [row[model]["is_correct"] for model in models],
        }
        for row in rows
    ]
    answers = [one for row in listed for one in read(row, "label") if isinstance(one, Preference)]
    assert len(answers) == 4 * 1319
    assert sum(one.label for one in answers) == sum(row[model]["is_correct"] for row in rows for model in models)
