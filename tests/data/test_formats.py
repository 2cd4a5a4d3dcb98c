"""Formats: one row of each, every reason to drop one, and what is said of a row that fits nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxpo.batch import Feedback
from jaxpo.data.files import Where
from jaxpo.data.formats import SHAPES, Drop, Reading, Shape, detect, parse, texts
from jaxpo.data.readers import SCORES, Preference
from jaxpo.data.record import Record
from jaxpo.errors import UserError

U, A, S, T = "user", "assistant", "system", "tool"


def say(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def shares(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": said} for who, said in turns]


def read_all(row: dict[str, Any], feedback: Feedback, n: int, format: str = "auto") -> list[Preference | Drop]:
    record = Record(Where("rows.jsonl:", 7), row)
    return parse(record, detect(record, format, feedback, n), n)


def read(row: dict[str, Any], n: int = 2, format: str = "auto", feedback: Feedback | None = None) -> Preference | Drop:
    """The one example of a row; without `feedback`, n answers are an answer to learn from, or a pair."""
    (one,) = read_all(row, feedback or ("completion" if n == 1 else "pair"), n, format)
    return one


HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
GREETING = Preference(say((U, "Hi")), (say((A, "Hello!")), say((A, "What?"))))

PAIRS = {
    "strings": (
        {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"},
        Preference("2+2=", (" 4", " 5")),
    ),
    "messages": (
        {"prompt": say((U, "Hi")), "chosen": say((A, "Hello!")), "rejected": say((A, "What?"))},
        GREETING,
    ),
    "one message, not a list": (
        {"prompt": say((U, "Hi")), "chosen": say((A, "Hello!"))[0], "rejected": say((A, "What?"))[0]},
        GREETING,
    ),
    "messages and answers as strings": (
        {"prompt": say((U, "Hi")), "chosen": "Hello!", "rejected": "What?"},
        GREETING,
    ),
    "a question as a string": (
        {"prompt": "Hi", "chosen": say((A, "Hello!")), "rejected": say((A, "What?"))},
        GREETING,
    ),
    "answers that repeat the prompt": (
        {
            "prompt": say((U, "Hi")),
            "chosen": say((U, "Hi"), (A, "Hello!")),
            "rejected": say((U, "Hi"), (A, "What?")),
        },
        GREETING,
    ),
    "UltraFeedback-binarized": (
        {
            "prompt": "Hi",
            "prompt_id": "x",
            "chosen": say((S, "Be kind"), (U, "Hi"), (A, "Hello!")),
            "rejected": say((S, "Be kind"), (U, "Hi"), (A, "What?")),
            "messages": say((U, "Hi"), (A, "Hello!")),
            "score_chosen": 8.0,
            "score_rejected": 3,
        },
        Preference(say((S, "Be kind"), (U, "Hi")), GREETING.completions, scores=(8.0, 3.0)),
    ),
    "scores": (
        {"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "chosen_score": 1, "rejected_score": 0.5},
        Preference("2+2=", (" 4", " 5"), scores=(1.0, 0.5)),
    ),
    "null scores": (
        {"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "chosen_score": None, "rejected_score": None},
        Preference("2+2=", (" 4", " 5")),
    ),
    "HH transcripts": (HH, GREETING),
    "HH transcripts of several turns": (
        {name: "\n\nHuman: Hm\n\nAssistant: Yes?" + text for name, text in HH.items()},
        Preference(say((U, "Hm"), (A, "Yes?"), (U, "Hi")), GREETING.completions),
    ),
    "message transcripts": (
        {"chosen": say((U, "Hi"), (A, "Hello!")), "rejected": say((U, "Hi"), (A, "What?"))},
        GREETING,
    ),
    "text transcripts": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        Preference("The sky is", (" blue.", " green.")),
    ),
    "HelpSteer3, the first better": (
        {"context": say((U, "Hi")), "response1": "Hello!", "response2": "What?", "overall_preference": -2},
        GREETING,
    ),
    "HelpSteer3, the second better": (
        {"context": say((U, "Hi")), "response1": "What?", "response2": "Hello!", "overall_preference": 1},
        GREETING,
    ),
    "ShareGPT pairs": (
        {
            "conversations": shares(("human", "Hm"), ("gpt", "Yes?"), ("human", "Hi")),
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "What?"},
            "system": "Be kind",
        },
        Preference(say((S, "Be kind"), (U, "Hm"), (A, "Yes?"), (U, "Hi")), GREETING.completions),
    ),
    "alpaca pairs": (
        {"instruction": "Hi", "input": "", "chosen": "Hello!", "rejected": "What?"},
        GREETING,
    ),
}

SINGLE = {
    "ShareGPT": (
        {
            "conversations": shares(
                ("human", "Hi"), ("function_call", "look up"), ("observation", "found"), ("gpt", "Hello!")
            ),
            "system": "",
            "tools": '[{"name": "look up"}]',
            "chat_template_kwargs": {"enable_thinking": False},
        },
        Preference(
            say((U, "Hi"), (A, "look up"), (T, "found")),
            (say((A, "Hello!")),),
            {"tools": [{"name": "look up"}], "enable_thinking": False},
        ),
    ),
    "conversations with roles": (
        {"conversations": say((U, "Hi"), (A, "Hello!"))},
        Preference(say((U, "Hi")), (say((A, "Hello!")),)),
    ),
    "alpaca": (
        {
            "instruction": "Add",
            "input": "2 2",
            "output": "4",
            "system": "Calculate",
            "history": [["Hi", "Hello!"]],
        },
        Preference(say((S, "Calculate"), (U, "Hi"), (A, "Hello!"), (U, "Add\n2 2")), (say((A, "4")),)),
    ),
    "completions as text": ({"prompt": "2+2=", "completion": " 4"}, Preference("2+2=", (" 4",))),
    "completions as messages": (
        {"prompt": say((U, "Hi")), "completion": say((A, "Hello!"))},
        Preference(say((U, "Hi")), (say((A, "Hello!")),)),
    ),
    "messages": (
        {"messages": say((U, "a"), (A, "b"), (U, "c"), (A, "d"))},
        Preference(say((U, "a"), (A, "b"), (U, "c")), (say((A, "d")),)),
    ),
    "messages in parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    "name": None,
                },
                {"role": "assistant", "content": "c"},
            ]
        },
        Preference(say((U, "ab")), (say((A, "c")),)),
    ),
    "text": ({"text": "Once upon a time"}, Preference("", ("Once upon a time",))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    row, expected = PAIRS[name]
    assert read(row) == expected


@pytest.mark.parametrize("name", PAIRS)
def test_of_a_pair_supervised_training_takes_the_chosen(name: str) -> None:
    row, expected = PAIRS[name]
    if "messages" in row:
        with pytest.raises(UserError, match=r"rows\.jsonl:7 can be read as messages or pairs .*data\.\*\.format"):
            read(row, 1)
        got = read(row, 1, "pairs")
    else:
        got = read(row, 1)
    assert got == Preference(expected.prompt, expected.completions[:1], expected.template_kwargs)


@pytest.mark.parametrize("name", SINGLE)
def test_single_answers(name: str) -> None:
    row, expected = SINGLE[name]
    assert read(row, 1) == expected


@pytest.mark.parametrize("name", SINGLE)
def test_single_answers_are_no_preferences(name: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:7 is of format .* compares 2 answers\. .*objective\.name sft"):
        read(SINGLE[name][0], 2)


def test_an_answer_may_use_tools_in_between() -> None:
    answer = say((A, "look up"), (T, "found"), (A, "Hello!"))
    row = {
        "chosen": [*say((U, "Hi")), *answer],
        "rejected": say((U, "Hi"), (A, "What?")),
    }
    assert read(row) == Preference(say((U, "Hi")), (answer, say((A, "What?"))))
    # Alone it is a conversation, of which the last turn is learned.
    assert read(row, 1) == Preference(say((U, "Hi"), (A, "look up"), (T, "found")), (say((A, "Hello!")),))


DROPS = [
    ("equal_answers", {"prompt": "p", "chosen": "a ", "rejected": "a"}),
    ("equal_answers", {"chosen": HH["chosen"], "rejected": HH["chosen"]}),
    ("equal_answers", {"chosen": "same", "rejected": "same"}),
    ("empty_answer", {"prompt": "p", "chosen": "a", "rejected": " \n"}),
    ("empty_answer", {"chosen": HH["chosen"], "rejected": "\n\nHuman: Hi\n\nAssistant:"}),
    ("empty_answer", {"chosen": "The sky", "rejected": "The sky is"}),
    ("empty_answer", {"chosen": say((U, "Hi")), "rejected": say((U, "Hi"), (A, "Hello!"))}),
    ("empty_prompt", {"prompt": " ", "chosen": "a", "rejected": "b"}),
    ("empty_prompt", {"chosen": "\n\nAssistant: Hello!", "rejected": "\n\nAssistant: What?"}),
    ("empty_prompt", {"chosen": "all", "rejected": "different"}),
    ("prompts_differ", {"chosen": HH["chosen"], "rejected": HH["rejected"].replace("Hi", "Ho")}),
    ("prompts_differ", {"chosen": HH["chosen"], "rejected": HH["rejected"] + "\n\nAssistant: Well?"}),
    (
        "prompts_differ",
        {
            "prompt": say((U, "Hi")),
            "chosen": say((U, "Ho"), (A, "Hello!")),
            "rejected": say((U, "Ho"), (A, "What?")),
        },
    ),
    (
        "prompts_differ",
        {
            "prompt": "something else",
            "chosen": say((U, "Hi"), (A, "Hello!")),
            "rejected": say((U, "Hi"), (A, "What?")),
        },
    ),
    ("answer_not_assistant", {"prompt": say((U, "Hi")), "chosen": say((T, "a")), "rejected": say((A, "b"))}),
    ("tie", {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 3.0}),
    ("tie", {"context": say((U, "Hi")), "response1": "a", "response2": "b", "overall_preference": 0}),
    ("scores_contradict", {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 2}),
]


@pytest.mark.parametrize(("reason", "row"), DROPS)
def test_degenerate_pairs_are_dropped_with_a_reason(reason: str, row: dict[str, Any]) -> None:
    dropped = read(row)
    assert isinstance(dropped, Drop)
    assert (dropped.reason, str(dropped.where)) == (reason, "rows.jsonl:7")
    assert all(column in dropped.excerpt for column in row)


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("answer_not_assistant", {"messages": say((U, "a"), (A, "b"), (U, "c"))}),
        ("empty_prompt", {"messages": say((A, "b"))}),
        ("empty_answer", {"prompt": "p", "completion": ""}),
        ("empty_answer", {"text": "  "}),
    ],
)
def test_degenerate_single_answers_are_dropped_with_a_reason(reason: str, row: dict[str, Any]) -> None:
    dropped = read(row, 1)
    assert isinstance(dropped, Drop)
    assert dropped.reason == reason


def test_scores_and_the_rejected_answer_do_not_matter_to_supervised_training() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "a", "chosen_score": 1, "rejected_score": 2}
    assert read(row, 1) == Preference("p", ("a",))


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            "auto",
            r"rows\.jsonl:7 has the columns answer, question, which fits no format .*auto.* pairs: chosen, prompt, rej",
        ),
        ({}, "auto", r"has the columns \(none\)"),
        (
            {"prompt": "p", "chosen": "a", "rejected": None},
            "auto",
            r"has the columns chosen, prompt \(null: rejected\), which fits no",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            "pairs",
            r"data\.\*\.format: pairs\). Expected pairs: chosen, prompt, rejected",
        ),
        (
            {"messages": say((U, "a"), (A, "b")), "label": False},
            "auto",
            "of format labels: the label marks binary feedback, which is for objective.name kto, bco or apo_zero_unp",
        ),
        (
            {"prompt": "p", "completions": ["a", "b"]},
            "auto",
            "of format rankings, a list of answers in order, which is for objective.name all_pairs, plackett_luce or",
        ),
        (
            {"prompt": "p", "chosen": 3, "rejected": "b"},
            "auto",
            r"rows\.jsonl:7: column chosen is 3, expected a string or a list of",
        ),
        (
            {"prompt": "p", "chosen": [], "rejected": "b"},
            "auto",
            r"column chosen is list \[\], expected a string or a list of mess",
        ),
        ({"prompt": "p", "chosen": ["x"], "rejected": "b"}, "auto", r"chosen\[0\] is 'x', expected a message"),
        (
            {"prompt": "p", "chosen": [{"role": "Bob", "content": "x"}], "rejected": "b"},
            "auto",
            r"chosen\[0\]\.role is 'Bob', expected one of assistant",
        ),
        (
            {"prompt": "p", "chosen": [{"role": "user"}], "rejected": "b"},
            "auto",
            r"chosen\[0\]\.content is None, expected a string",
        ),
        (
            {"prompt": "p", "chosen": [{"role": "user", "content": [{"type": "image"}]}], "rejected": "b"},
            "auto",
            r"chosen\[0\]\.content holds parts that are not text",
        ),
        (
            {"prompt": "p", "chosen": "a\ud800", "rejected": "b"},
            "auto",
            "chosen holds half of a surrogate pair at char",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 1},
            "auto",
            "has chosen_score but not both of chosen_score and rejected_score",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": "1", "rejected_score": 0},
            "auto",
            "column chosen_score is '1', expected a number",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": float("nan"), "rejected_score": 0},
            "auto",
            "column chosen_score is nan, expected a number",
        ),
        (
            {"context": "c", "response1": "a", "response2": "b", "overall_preference": "A"},
            "auto",
            "column overall_preference is 'A', expected a number",
        ),
        (
            {"chosen": say((U, "a"), (A, "b")), "rejected": "b"},
            "auto",
            "column rejected is 'b', expected of the same kind",
        ),
        (
            {"conversations": "hi", "chosen": "a", "rejected": "b"},
            "auto",
            "column conversations is 'hi', expected a list",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "chat_template_kwargs": "x"},
            "auto",
            "column chat_template_kwargs is 'x', expected an object",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "tools": "[", "text": "t"},
            "pairs",
            "column tools is '\\[', expected a JSON array",
        ),
        (
            {"instruction": ["x"], "chosen": "a", "rejected": "b"},
            "auto",
            "column instruction is list .* expected a string",
        ),
        (
            {"instruction": "i", "history": ["x"], "chosen": "a", "rejected": "b"},
            "auto",
            r"column history is list .* expected \[question, answer\] at index 0",
        ),
    ],
)
def test_rows_that_cannot_be_read_name_row_and_column(row: dict[str, Any], format: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(row, 2, format)


def test_a_labelled_answer_is_read_where_the_format_is_named() -> None:
    row = {"messages": say((U, "a"), (A, "b")), "label": True}
    assert read(row, 1, "messages") == Preference(say((U, "a")), (say((A, "b")),))


def test_a_later_row_must_fit_the_first_ones_format() -> None:
    reading = detect(Record(Where("a:", 1), HH), "auto", "pair", 2)
    with pytest.raises(UserError, match=r"a:2 has the columns chosen, which fits no .*transcripts: chosen, rejected"):
        parse(Record(Where("a:", 2), {"chosen": "x"}), reading, 2)


class Noted(dict[str, Any]):
    """A row that notes which of its columns are read."""

    def __init__(self, row: dict[str, Any]):
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.read.add(column)
        return super().get(column, default)


COLUMNS: dict[str, Any] = (
    {"prompt": "p", "completion": "a", "completions": ["a", "b"], "text": "t", "chosen": "p a", "rejected": "p b"}
    | {"conversations": say((U, "p"), (A, "a")), "messages": say((U, "p"), (A, "a")), "context": "p"}
    | {"response1": "a", "response2": "b", "overall_preference": -1, "instruction": "p", "output": "a"}
    | {"input": "i", "history": [["q", "a"]], "system": "s", "tools": "[]", "chat_template_kwargs": {}}
    | {"label": 1, "kto_tag": 1, "labels": [1, 0], "scores": [2, 1], "margin": 1, "chosen_probability": 0.5}
    | {"chosen_score": 2, "rejected_score": 1, "score_chosen": 2, "score_rejected": 1, "id": 7}
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shape_names_the_columns_that_are_read(shape: Shape) -> None:
    for column in COLUMNS:
        columns = {*shape.needs, column}
        columns |= next(({*pair} for pair in SCORES if column in pair), set())
        columns |= {"label"} if shape.one_of and column not in shape.one_of else set()
        row = Noted({name: COLUMNS[name] for name in columns})
        (one, *_) = parse(Record(Where("a:", 1), row), Reading(shape, shape.says, frozenset(), "scores" in columns), 2)
        assert isinstance(one, Preference)
        assert (column in row.read) == (column in shape.reads), column


def test_a_label_beside_a_text_is_a_category() -> None:
    reading = detect(Record(Where("a:", 1), {"text": "A film.", "label": 1}), "auto", "completion", 1)
    assert reading.format == "text"
    assert "label" not in reading.refuses


def test_every_text_is_there_for_a_tokenizer_to_learn_from() -> None:
    assert list(texts(Drop(Where("a:", 1), "tie", ""))) == []
    assert list(texts(GREETING)) == ["Hi", "Hello!", "What?"]
    assert list(texts(Preference("p", ("a",)))) == ["p", "a"]


@pytest.mark.parametrize(
    ("name", "feedback", "n", "format", "answers"),
    [
        ("dpo_en", "pair", 2, "conversations", 1),
        ("dpo_zh", "pair", 2, "conversations", 1),
        ("dpo_zh", "ranking", 4, "conversations", 1),
        ("dpo_zh", "label", 1, "conversations", 2),
        ("alpaca_en", "completion", 1, "alpaca", 1),
        ("kto_en", "label", 1, "labels", 1),
    ],
)
def test_the_demo_files_of_llama_factory(
    shared: Path, name: str, feedback: Feedback, n: int, format: str, answers: int
) -> None:
    rows = json.loads((shared / f"data/llamafactory-demo/{name}_demo.json").read_text(encoding="utf-8"))
    assert detect(Record(Where("", 1), rows[0]), "auto", feedback, n).format == format
    parsed = [read_all(row, feedback, n) for row in rows]
    assert all(isinstance(one, Preference) for of_row in parsed for one in of_row)
    assert {len(of_row) for of_row in parsed} == {answers}
