"""The score command: every row with its answers' rewards in columns that training reads, or told why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpo import launch, rating
from jaxpo.config import DataConfig, DataSource
from jaxpo.data.dataset import TokenizedDataset, prepare
from jaxpo.data.tokenizer import load_tokenizer
from jaxpo.errors import UserError
from jaxpo.rewards import RewardModel

GOOD, BAD = "It is on its way, thank you.", "No idea."
PAIRS = [
    {"prompt": "Where is it?", "chosen": GOOD, "rejected": BAD, "id": 7},
    {"prompt": [{"role": "user", "content": "Où est-il ?"}], "chosen": "Là.", "rejected": "中文"},
]


@pytest.fixture(scope="module")
def folder(reward_model: Callable[..., Path]) -> Path:
    return reward_model()


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.load(folder)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rated(folder: Path, tmp_path: Path, rows: list[Any], **options: Any) -> list[dict[str, Any]]:
    rating.rate(str(folder), str(write(tmp_path / "rows.jsonl", rows)), tmp_path / "rated.jsonl", **options)
    return [json.loads(line) for line in (tmp_path / "rated.jsonl").read_text(encoding="utf-8").splitlines()]


def training_data(tmp_path: Path, folder: Path, feedback: Any, num_completions: int) -> TokenizedDataset:
    return prepare(
        DataSource(path=str(tmp_path / "rated.jsonl")),
        DataConfig(cache_dir=tmp_path / "cache", workers=1),
        load_tokenizer(str(folder)),
        "tokenizer",
        feedback,
        num_completions,
    )


def test_pairs_get_two_scores_and_stay_as_they_are(folder: Path, model: RewardModel, tmp_path: Path) -> None:
    found = rated(folder, tmp_path, PAIRS)
    assert [{k: v for k, v in row.items() if not k.endswith("_score")} for row in found] == PAIRS
    expected = model.score([(row["prompt"], [row["chosen"], row["rejected"]]) for row in PAIRS])
    scores = np.array([[row["chosen_score"], row["rejected_score"]] for row in found])
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    assert "中文".encode() in (tmp_path / "rated.jsonl").read_bytes()


def test_scored_pairs_are_data_with_margins(folder: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Question {n}?", "chosen": f"{GOOD} {n}", "rejected": f"{BAD} {n}"} for n in range(20)]
    found = rated(folder, tmp_path, pairs)
    data = training_data(tmp_path, folder, "pair", 2)
    agreed = [row for row in found if row["chosen_score"] > row["rejected_score"]]
    assert len(data) == len(agreed)
    assert data.dropped.get("scores_contradict", 0) == len(found) - len(agreed)
    for example, row in zip(data, agreed, strict=True):
        np.testing.assert_array_equal(
            example.scores, np.array([row["chosen_score"], row["rejected_score"]], np.float32)
        )


def test_lists_get_a_score_for_each_answer_in_their_order(folder: Path, model: RewardModel, tmp_path: Path) -> None:
    rows = [{"prompt": "Where?", "completions": [GOOD, BAD, "Here."]}, {"prompt": "Why?", "completions": [BAD]}]
    first, second = rated(folder, tmp_path, rows)
    np.testing.assert_allclose(first["scores"], model.score([("Where?", [GOOD, BAD, "Here."])])[0], rtol=1e-5)
    assert len(second["scores"]) == 1
    (example,) = training_data(tmp_path, folder, "ranking", 3)
    np.testing.assert_array_equal(example.scores, np.array(sorted(first["scores"], reverse=True), np.float32))


def test_equal_answers_of_a_list_are_scored_too(folder: Path, tmp_path: Path) -> None:
    (row,) = rated(folder, tmp_path, [{"prompt": "Where?", "completions": [GOOD, GOOD]}])
    np.testing.assert_allclose(*row["scores"], rtol=1e-5)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "Where?", "completion": GOOD}, "rewards"),
        ({"prompt": "Where?", "completion": GOOD, "label": False}, "rewards"),
        ({"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": GOOD}]}, "rewards"),
        ({"instruction": "Where?", "output": GOOD}, "rewards"),
        ({"text": GOOD}, "rewards"),
        ({"prompt": "Where?", "completions": [GOOD, BAD], "labels": [True, False]}, "scores"),
        ({"chosen": f"\n\nHuman: a\n\nAssistant: {GOOD}", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "chosen_score"),
        # UltraFeedback's rows hold the chosen conversation once more.
        (
            {**PAIRS[0], "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "chosen_score",
        ),
    ],
)
def test_every_format(folder: Path, tmp_path: Path, row: dict[str, Any], column: str) -> None:
    (found,) = rated(folder, tmp_path, [row])
    assert {**found, **row} == found
    assert sorted(found.keys() - row.keys()) == sorted({column} if column != "chosen_score" else rating.PAIR)


def test_what_is_left_out_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a?", "chosen": " ", "rejected": BAD}, *PAIRS, {"prompt": " ", "chosen": GOOD, "rejected": BAD}]
    assert len(rated(folder, tmp_path, rows)) == 2
    said = capsys.readouterr().out
    assert "rows scored              2, in" in said
    assert all(words in said for words in ("empty_answer", "empty_prompt", "rows left out"))
    assert "rows.jsonl:1, empty_answer: prompt: a?" in said


def test_agreement_and_cuts_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "a?", "chosen": "x" * 200, "rejected": "x" * 100}
    found = rated(folder, tmp_path, [row, {**row, "chosen": "y", "rejected": "z"}], max_length=30)
    np.testing.assert_allclose(found[0]["chosen_score"], found[0]["rejected_score"], rtol=1e-5)
    said = capsys.readouterr().out
    assert "answers cut              2, to --max-length" in said
    assert "chosen above rejected    " in said


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{**PAIRS[0], "chosen_score": 1.0}], r"rows.jsonl:1 has the columns chosen_score already"),
        ([PAIRS[1], {**PAIRS[0], "margin": 1.0}], r"rows.jsonl:2 has the columns margin already"),
        ([{"prompt": "a", "completions": ["b"], "scores": [1.0]}], r"the columns scores already"),
        ([{"prompt": "a", "chosen": " ", "rejected": "b"}], r"no row can be scored \(empty_answer: 1\)"),
        ([PAIRS[0], {"prompt": "a"}], r"rows.jsonl:2 has the columns prompt, which fits no format"),
        ([{"prompt": 3, "chosen": "a", "rejected": "b"}], r"rows.jsonl:1: column prompt is 3"),
        ([{"nothing": 1}], r"fits no format"),
    ],
)
def test_rows_that_cannot_be_scored_leave_nothing(folder: Path, tmp_path: Path, rows: list[Any], words: str) -> None:
    write(tmp_path / "rows.jsonl", rows)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=words):
        rated(folder, tmp_path, rows)
    assert tree(tmp_path) == before


def test_a_null_column_may_be_filled(folder: Path, tmp_path: Path) -> None:
    (row,) = rated(folder, tmp_path, [{**PAIRS[0], "chosen_score": None, "rejected_score": None}])
    assert isinstance(row["chosen_score"], float)


def test_a_file_that_is_there_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rated.jsonl").write_text("years of work")
    with pytest.raises(UserError, match=r"--output .*rated\.jsonl is there already"):
        rated(folder, tmp_path, PAIRS)
    assert (tmp_path / "rated.jsonl").read_text() == "years of work"
    write(tmp_path / "rows.jsonl", PAIRS)
    with pytest.raises(UserError, match=r"--output .*no/out.jsonl cannot be written: No such file"):
        rating.rate(str(folder), str(tmp_path / "rows.jsonl"), tmp_path / "no/out.jsonl")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300, r'--output is ".*…", which is too long for the name of a file'),
        ("x/" * 3000 + "y.jsonl", r"--output .* cannot be written: File name too long"),
        ("rated.json", r"--output .*rated.json has the suffix .json; expected a name that ends in .jsonl"),
        ("rated.jsonl.gz", r"rated.jsonl.gz has the suffix .gz; expected a name that ends in .jsonl"),
        ("rated", r"rated has no suffix; expected a name that ends in .jsonl"),
    ],
)
def test_a_name_that_no_json_lines_can_have(folder: Path, tmp_path: Path, name: str, words: str) -> None:
    rows = write(tmp_path / "rows.jsonl", PAIRS)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=words):
        rating.rate(str(folder), str(rows), tmp_path / name)
    assert tree(tmp_path) == before


def test_paths_that_no_file_can_have(folder: Path, tmp_path: Path) -> None:
    long, out = "x" * 300, tmp_path / "out.jsonl"
    for option, model, rows, template in (
        ("MODEL", long, "rows.jsonl", None),
        ("ROWS", str(folder), long, None),
        ("--chat-template", str(folder), "rows.jsonl", long),
    ):
        with pytest.raises(UserError, match=f'^{option} is ".*", which is too long for the name of a file'):
            rating.rate(model, rows, out, chat_template=template)


def test_what_is_wrong_is_told_by_the_options(
    reward_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command has no config, and so no keys of one."""
    folder = reward_model()
    without = json.loads((folder / "tokenizer_config.json").read_text())
    without.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(without))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    rows = str(write(tmp_path / "rows.jsonl", [PAIRS[1]]))
    (tmp_path / "text.json").write_text('["a"]')
    (tmp_path / "rows.csv").write_text("a")

    def told(*arguments: str) -> str:
        assert launch.main(["score", str(folder), *arguments, "--output", str(tmp_path / "out.jsonl")]) == 2
        said = capsys.readouterr().err
        assert "data." not in said
        return said

    assert "gone.jsonl (ROWS) does not exist" in told(str(tmp_path / "gone.jsonl"))
    assert "rows.csv (ROWS) is no file that jaxpo reads" in told(str(tmp_path / "rows.csv"))
    assert "has no split 'test' (--split), expected one of train" in told(rows, "--split", "test")
    assert "fits no format that was asked for (--format alpaca)" in told(rows, "--format", "alpaca")
    assert "Plain strings are read with --format text" in told(str(tmp_path / "text.json"))
    assert "Name one in --chat-template: a file, or one of chatml, " in told(rows)
    assert "--chat-template is 'chatlm', which is neither" in told(rows, "--chat-template", "chatlm")
    template = tmp_path / "mine.jinja"
    template.write_text("{% for")
    assert "The chat template (--chat-template, or the tokenizer's own) is no valid Jinja" in told(
        rows, "--chat-template", str(template)
    )


def test_another_chat_template_gives_other_rewards(folder: Path, tmp_path: Path) -> None:
    (own,) = rated(folder, tmp_path, [PAIRS[1]])
    (tmp_path / "rated.jsonl").unlink()
    (other,) = rated(folder, tmp_path, [PAIRS[1]], chat_template="alpaca")
    expected = RewardModel.load(folder, chat_template="alpaca").score([(PAIRS[1]["prompt"], ["Là."])])
    np.testing.assert_allclose(other["chosen_score"], expected[0, 0], rtol=1e-5)
    assert abs(own["chosen_score"] - other["chosen_score"]) > 1e-4


def test_a_prompt_that_fills_the_length_leaves_its_row_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [PAIRS[0], {**PAIRS[0], "prompt": "Where is it? " * 40}]
    assert len(rated(folder, tmp_path, rows, max_length=100)) == 1
    assert "no_completion_left" in capsys.readouterr().out


def test_a_run_for_a_model_is_told_where_its_model_is(folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", PAIRS)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match=r"run has no config.json; expected a Hugging Face checkpoint\.$"):
        rating.rate(str(run), str(rows), tmp_path / "out.jsonl")
    (run / "export").symlink_to(folder)
    with pytest.raises(UserError, match=r"has no config.json; .* Did you mean .*/run/export\?$"):
        rating.rate(str(run), str(rows), tmp_path / "out.jsonl")


def test_weights_that_are_no_numbers_are_told(reward_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = reward_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"][:] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"rows.jsonl:1 gets the rewards \[nan, nan\]"):
        rated(folder, tmp_path, PAIRS)


def test_lines_hold_what_json_can_say() -> None:
    where: Any = "rows.parquet:row 1"
    assert rating.line(where, {"a": "é"}) == '{"a": "é"}\n'.encode()
    assert json.loads(rating.line(where, {"a": "\ud800"})) == {"a": "\ud800"}
    with pytest.raises(UserError, match=r"rows\.parquet:row 1 has a column that JSON cannot say"):
        rating.line(where, {"a": b"bytes"})


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "rows.jsonl", PAIRS)
    command = ["score", str(folder), str(rows), "--output", str(tmp_path / "out.jsonl")]
    assert launch.main([*command, "--split", "test"]) == 2
    assert "no split 'test'" in capsys.readouterr().err
    assert launch.main([*command, "--format", "pear"]) == 2
    assert "--format is 'pear'; expected one of auto, pairs" in capsys.readouterr().err
    assert launch.main(command) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert launch.main(command) == 2
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        launch.main([*command, "--max-length", "0"])
