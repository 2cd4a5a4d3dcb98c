"""Tokenised data: what is kept, dropped and counted, and when the cache on disk is used."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxpo.data import dataset as module
from jaxpo.data.dataset import TokenizedDataset
from jaxpo.data.tokenizer import train_tokenizer
from jaxpo.errors import UserError

PAIR = {"prompt": "the cat ", "chosen": "sat on the mat", "rejected": "said hello"}
CHAT = {"prompt": [{"role": "user", "content": "the cat"}], "chosen": "sat on the mat", "rejected": "said hello"}


@pytest.fixture
def makes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders made so far."""
    made: list[Path] = []
    make = module._make

    def counting(folder: Path, *rest: Any) -> None:
        made.append(folder)
        make(folder, *rest)

    monkeypatch.setattr(module, "_make", counting)
    return made


def test_examples_lengths_and_names(write, tokenised, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write([PAIR, {**PAIR, "rejected": PAIR["chosen"]}, {**PAIR, "chosen": "hello"}])
    data = tokenised(path)
    assert len(data) == 2
    assert [example.id for example in data] == [f"{path}:1", f"{path}:3"]
    first = data[0]
    assert tokenizer.decode(first.prompt) == "the cat"
    assert [tokenizer.decode(c) for c in first.completions] == [" sat on the mat<|im_end|>", " said hello<|im_end|>"]
    assert first.prompt.dtype == first.completions[0].dtype == np.int32
    assert data.prompt_lengths.tolist() == [len(example.prompt) for example in data]
    assert data.completion_lengths.tolist() == [[len(c) for c in example.completions] for example in data]
    assert data.prompt_lengths.dtype == data.completion_lengths.dtype == np.int32
    assert (data.num_completions, data.format, data.rows_read, data.templated) == (2, "pairs", 3, 0)
    with pytest.raises(IndexError):
        data[2]


def test_of_a_pair_supervised_training_sees_the_chosen(write, tokenised, tokenizer: PreTrainedTokenizerFast) -> None:
    data = tokenised(write([CHAT]), num_completions=1)
    assert data.completion_lengths.shape == (1, 1)
    assert [tokenizer.decode(c) for c in data[0].completions] == ["sat on the mat<|im_end|>\n"]
    assert data.templated == 1


def test_every_dropped_row_is_counted_and_listed(write, tokenised) -> None:
    rows = [
        PAIR,
        {**PAIR, "chosen": " "},
        {**PAIR, "chosen": "same", "rejected": "same"},
        {**PAIR, "prompt": ""},
        {**PAIR, "chosen_score": 1, "rejected_score": 1},
        {**PAIR, "prompt": "the cat sat on the mat and said hello there " * 9},
        {**PAIR, "chosen": "the cat sat on the mat" * 9 + "a", "rejected": "the cat sat on the mat" * 9 + "b"},
    ]
    path = write(rows)
    data = tokenised(path, max_length=40)
    assert data.dropped == dict.fromkeys(
        ("empty_answer", "equal_answers", "empty_prompt", "tie", "no_completion_left", "equal_after_truncation"), 1
    )
    lines = [json.loads(line) for line in data.dropped_path.read_text(encoding="utf-8").splitlines()]
    assert [(line["where"], line["reason"]) for line in lines] == list(
        zip([f"{path}:{i}" for i in range(2, 8)], data.dropped, strict=True)
    )
    assert "said hello" in lines[0]["excerpt"]
    assert data.rows_read == len(rows)
    assert data.truncated == {"prompt": 0, "completion": 0}, "a dropped row counts as dropped, not as cut"


def test_a_row_the_template_refuses_is_listed_with_its_words(write, tokenised, tmp_path: Path) -> None:
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('Not that!') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    rows = [CHAT, {**CHAT, "prompt": [{"role": "user", "content": "no"}]}]
    data = tokenised(write(rows), chat_template=str(tmp_path / "strict.jinja"))
    assert data.dropped == {"template_refused": 1}
    assert json.loads(data.dropped_path.read_text())["excerpt"].startswith("Not that!: prompt: ")


def test_what_is_cut_is_counted(write, tokenised, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenised(write([CHAT] * 3))[0]
    P, (chosen, rejected) = len(whole.prompt), whole.completions
    assert len(chosen) > len(rejected)
    data = tokenised(write([CHAT] * 3), max_prompt_length=P - 2, max_length=P - 2 + len(chosen) - 1)
    assert data.truncated == {"prompt": 3, "completion": 3}
    example = data[1]
    assert example.prompt.tolist() == whole.prompt[2:].tolist()
    assert [c.tolist() for c in example.completions] == [chosen[:-1].tolist(), rejected.tolist()]
    right = tokenised(write([CHAT]), max_prompt_length=P - 2, truncate_prompt="right")
    assert right[0].prompt.tolist() == whole.prompt[:-2].tolist()


def test_a_moved_boundary_and_a_missing_end_are_told(write, tokenised, tmp_path: Path, capsys) -> None:
    (tmp_path / "odd.jinja").write_text(
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}And?{% endif %}"
    )
    data = tokenised(write([CHAT, CHAT]), chat_template=str(tmp_path / "odd.jinja"))
    assert (data.boundary_moved, data.lost, data.without_end) == (2, "And?", 4)
    said = " ".join(capsys.readouterr().err.split())
    assert "in 2 of 2 examples the tokenised prompt is no prefix" in said
    assert "'And?'" in said
    assert "4 of 4 completions end with no special token" in said


def test_a_completion_that_is_cut_is_not_blamed_for_its_missing_end(write, tokenised, capsys) -> None:
    P = tokenised(write([CHAT])).prompt_lengths[0]
    data = tokenised(write([CHAT]), max_length=int(P) + 3)
    assert (data.truncated["completion"], data.without_end) == (2, 0)
    assert capsys.readouterr().err == ""


def test_markers_that_the_tokenizer_lacks_are_told(write, tokenised, capsys) -> None:
    tokenised(write([CHAT]), chat_template="zephyr")
    assert "writes <|system|>, <|user|>, <|assistant|>, </s>, which this tokenizer has no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([{**PAIR, "chosen": ""}] * 2, {}, r"every row is dropped \(empty_answer: 2\).* The first: .*rows\.jsonl:1"),
        ([PAIR], {"max_length": 8, "max_prompt_length": 8}, r"data\.max_prompt_length is 8 and data\.max_length 8"),
        ([CHAT], {"chat_template": "chatlm"}, "Did you mean chatml"),
        ([PAIR, {"prompt": "p"}], {}, r"rows\.jsonl:2 has the columns prompt, which fits no format"),
        ([{"text": "t"}], {}, r"rows\.jsonl:1 is of format text, one answer to a prompt"),
        ([], {}, "holds no rows"),
    ],
)
def test_errors_leave_no_cache(write, tokenised, tmp_path: Path, rows, config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenised(write(rows), **config)
    assert not list((tmp_path / "cache").glob("*/*.npy"))


def test_a_cache_that_cannot_be_written(write, tokenised, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir .*file/cache cannot be used"):
        tokenised(write([PAIR]), cache_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ({}, 1),
        ({"shuffle": False, "workers": 2}, 1),
        ({"source": {"weight": 0.5}}, 1),
        ({"max_length": 1023}, 2),
        ({"max_prompt_length": 512}, 2),
        ({"truncate_prompt": "right"}, 2),
        ({"num_completions": 1}, 2),
        ({"feedback": "ranking"}, 2),
        ({"feedback": "label", "num_completions": 1}, 2),
        ({"chat_template": "zephyr"}, 2),
        ({"source": {"limit": 1}}, 2),
        ({"source": {"format": "pairs"}}, 2),
    ],
)
def test_the_cache_is_used_when_nothing_that_decides_tokens_has_changed(
    write, tokenised, makes: list[Path], change: dict[str, Any], made: int
) -> None:
    path = write([CHAT, PAIR])
    tokenised(path)
    tokenised(path, **change)
    assert len(makes) == len(set(makes)) == made


def test_the_cache_follows_the_content_of_the_file(write, tokenised, makes: list[Path]) -> None:
    path = write([CHAT])
    before = tokenised(path)
    path.touch()
    assert tokenised(path).fingerprint == before.fingerprint
    assert len(makes) == 1
    write([{**CHAT, "chosen": "sat on the Mat"}])
    assert tokenised(path).fingerprint != before.fingerprint
    assert len(makes) == 2


def test_the_cache_follows_tokenizer_and_template(write, tokenised, makes: list[Path]) -> None:
    path = write([CHAT])
    tokenised(path)
    other = train_tokenizer(["some other text altogether"] * 20, 300, "chatml")
    tokenised(path, tokenizer=other)
    assert len(makes) == 2
    other.eos_token = "<|endoftext|>"
    tokenised(path, tokenizer=other)
    assert len(makes) == 3
    other.chat_template = f"{other.chat_template}{{# changed #}}"
    tokenised(path, tokenizer=other)
    assert len(makes) == 4


def test_the_fingerprint_is_of_token_ids_and_their_order_alone(write, tokenised, tmp_path: Path) -> None:
    a, b = CHAT, {**CHAT, "chosen": "hello"}
    data = tokenised(write([a, b]))
    assert tokenised(write([a, b], "elsewhere.jsonl"), max_length=900).fingerprint == data.fingerprint
    assert tokenised(write([a, {**a, "chosen": ""}, b], "more.jsonl")).fingerprint == data.fingerprint
    assert tokenised(write([b, a], "turned.jsonl")).fingerprint != data.fingerprint
    assert tokenised(write([a, {**b, "rejected": "hello said"}], "other.jsonl")).fingerprint != data.fingerprint
    # The same tokens, differently parted.
    parted = tokenised(write([{**PAIR, "prompt": "the", "chosen": " cat sat", "rejected": " cat said"}], "p.jsonl"))
    moved = tokenised(write([{**PAIR, "prompt": "the cat", "chosen": " sat", "rejected": " said"}], "q.jsonl"))
    assert parted.fingerprint != moved.fingerprint


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens.npy", "lengths.npy", "labels.npy", "scores.npy", "wheres.npy", "meta.json"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size // 2)], ids=["missing", "cut"]
)
def test_a_damaged_cache_is_made_anew_with_a_warning(
    write, tokenised, makes: list[Path], capsys, name: str, damage: Callable[[Path], None]
) -> None:
    path = write([CHAT, PAIR])
    before = tokenised(path)
    damage(before.folder / name)
    after = tokenised(path)
    assert len(makes) == 2
    assert "damaged and made anew" in capsys.readouterr().err
    assert after.fingerprint == before.fingerprint
    assert after[0].prompt.tolist() == tokenised(path)[0].prompt.tolist()


def test_a_cache_without_its_list_of_dropped_rows_is_made_anew(write, tokenised, makes: list[Path], capsys) -> None:
    path = write([CHAT, {**CHAT, "chosen": ""}])
    tokenised(path).dropped_path.unlink()
    assert tokenised(path).dropped_path.read_text().count("empty_answer") == 1
    assert "dropped.jsonl is missing" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["tokens", "lengths", "labels", "scores"])
def test_a_changed_value_in_the_cache_is_noticed(write, tokenised, makes: list[Path], capsys, name: str) -> None:
    path = write([{**CHAT, "margin": 2}, PAIR])
    folder = tokenised(path).folder
    flip(folder / f"{name}.npy")
    tokenised(path)
    assert len(makes) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "was changed since it was written" in said or "tokens.npy holds" in said


def test_what_a_killed_run_left_behind_is_cleared(write, tokenised) -> None:
    path = write([CHAT])
    folder = tokenised(path).folder
    left = folder.rename(folder.with_name(f"{folder.name}.abc.partial"))
    assert len(tokenised(path)) == 1
    assert not left.exists()


def test_the_loser_of_a_race_takes_the_winners_result(write, tokenised, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([CHAT])
    winner = tokenised(path).folder
    inode = (winner / "tokens.npy").stat().st_ino
    monkeypatch.setattr(module, "_open", lambda folder: None)
    assert len(tokenised(path)) == 1
    assert (winner / "tokens.npy").stat().st_ino == inode
    assert not list(winner.parent.glob("*.partial"))


def test_a_dataset_travels_to_another_process_by_name(write, tokenised) -> None:
    data = tokenised(write([CHAT] * 50))
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000
    copy: TokenizedDataset = pickle.loads(pickled)
    assert copy[49].id == data[49].id
    assert copy.fingerprint == data.fingerprint


def test_processes_give_the_same_tokens_in_the_same_order(write, tokenised, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {**CHAT, "chosen": f"sat on mat {i}", "rejected": "" if i % 7 == 0 else "said", "chosen_probability": i / 40}
        for i in range(40)
    ]
    path = write(rows)
    alone = tokenised(path)
    monkeypatch.setattr(module, "POOL_ROWS", 8)
    monkeypatch.setattr("jaxpo.data.tokenise.CHUNK_ROWS", 6)
    together = tokenised(path, workers=2, cache_dir=alone.folder.parent / "second")
    assert together.folder != alone.folder
    assert together.fingerprint == alone.fingerprint
    assert together.judgements == alone.judgements
    assert [e.id for e in together] == [e.id for e in alone]
    assert together.dropped == alone.dropped == {"empty_answer": 6}
    assert together.rows_read == alone.rows_read == 40
    assert together.dropped_path.read_text() == alone.dropped_path.read_text()


def test_an_error_in_a_process_is_the_users_to_mend(write, tokenised, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POOL_ROWS", 8)
    with pytest.raises(UserError, match=r"rows\.jsonl:31: column chosen is 3"):
        tokenised(write([CHAT] * 30 + [{**CHAT, "chosen": 3}]), workers=2)


ASKED = [{"role": "user", "content": "the cat"}]


def test_labelled_answers(write, tokenised, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": ASKED, "completion": "sat on the mat", "label": True},
        {"prompt": ASKED, "completion": "", "label": True},
        {"prompt": ASKED, "completion": "said hello", "label": 0.25},
    ]
    path = write(rows)
    data = tokenised(path, 1, "label")
    assert (data.feedback, data.num_completions, data.format, data.pairs_parted) == ("label", 1, "labels", 0)
    assert data.labels.tolist() == [example.label for example in data] == [1.0, 0.25]
    assert data.labels.dtype == np.float32
    assert data.scores is None and data[0].scores is None and data.unrated == 0
    assert [example.id for example in data] == [f"{path}:1", f"{path}:3"]
    assert [tokenizer.decode(c) for c in data[1].completions] == ["said hello<|im_end|>\n"]
    assert data.soft
    assert not tokenised(write(rows[:1]), 1, "label").soft


def test_pairs_as_labelled_answers_have_names_of_their_own(write, tokenised, capsys) -> None:
    rows = [
        {**CHAT, "chosen_probability": 0.75},
        {**CHAT, "rejected": CHAT["chosen"]},
        {**CHAT, "chosen": " "},
        {**CHAT, "chosen": "hello"},
    ]
    path = write(rows)
    capsys.readouterr()
    data = tokenised(path, 1, "label")
    assert [example.id for example in data] == [
        f"{path}:1 (chosen)",
        f"{path}:1 (rejected)",
        f"{path}:3 (rejected)",
        f"{path}:4 (chosen)",
        f"{path}:4 (rejected)",
    ]
    assert data.labels.tolist() == [0.75, 0.25, 0.0, 1.0, 0.0]
    assert (data.format, data.rows_read, data.pairs_parted) == ("pairs", 4, 3)
    assert data.dropped == {"equal_answers": 1, "empty_answer": 1}
    lines = [json.loads(line) for line in data.dropped_path.read_text(encoding="utf-8").splitlines()]
    assert [(line["where"], line["reason"]) for line in lines] == [
        (f"{path}:2", "equal_answers"),
        (f"{path}:3 (chosen)", "empty_answer"),
    ]
    assert "3 pairs are read as 5 labelled answers" in " ".join(capsys.readouterr().out.split())
    pair = tokenised(path)[0]
    assert [data[i].completions[0].tolist() for i in (0, 1)] == [c.tolist() for c in pair.completions]
    assert data[0].prompt.tolist() == data[1].prompt.tolist() == pair.prompt.tolist()


def test_listed_answers_are_cut_and_dropped_one_by_one(write, tokenised) -> None:
    row = {"prompt": ASKED, "completions": ["said hello", "sat on the mat and said", ""], "labels": [1, 0, 1]}
    path = write([row])
    long = tokenised(path, 1, "label")
    assert [example.id for example in long] == [f"{path}:1 (answer 1)", f"{path}:1 (answer 2)"]
    assert long.dropped == {"empty_answer": 1} and long.rows_read == 1
    most = int((long.prompt_lengths + long.completion_lengths[:, 0]).min())
    data = tokenised(path, 1, "label", max_length=most)
    assert data.truncated == {"prompt": 0, "completion": 1}
    assert data.labels.tolist() == [1.0, 0.0]


def test_a_ranking_ends_in_completions_of_no_tokens(write, tokenised, tokenizer: PreTrainedTokenizerFast) -> None:
    three = {"prompt": ASKED, "completions": ["hello", "said", "sat"], "scores": [1, 3, 2]}
    rows = [
        three,
        {**three, "completions": list("abcde"), "scores": list(range(5))},
        {**CHAT, "completions": ["a", "b"], "scores": [4, 1]},
    ]
    path = write(rows)
    data = tokenised(path, 4, "ranking", source={"format": "rankings"})
    assert (data.feedback, data.num_completions, data.format) == ("ranking", 4, "rankings")
    assert data.dropped == {"over_max_completions": 1}
    first, second = data
    assert [tokenizer.decode(c) for c in first.completions] == [
        *(f"{text}<|im_end|>\n" for text in ("said", "sat", "hello")),
        "",
    ]
    assert [len(c) > 0 for c in second.completions] == [True, True, False, False]
    assert all(c.dtype == np.int32 for example in data for c in example.completions)
    assert (data.completion_lengths > 0).sum(axis=1).tolist() == [3, 2]
    assert data.scores is not None and data.scores.dtype == np.float32
    assert data.scores.tolist() == [[3, 2, 1, 0], [4, 1, 0, 0]]
    assert first.scores is not None and first.scores.tolist() == [3, 2, 1, 0]
    assert data.unrated == 0
    assert data.without_end == 0


def test_a_pair_is_a_ranking_of_two(write, tokenised) -> None:
    path = write([{**CHAT, "margin": 1.5}])
    pair, ranking = tokenised(path), tokenised(path, 3, "ranking")
    assert ranking.completion_lengths.tolist() == [[*pair.completion_lengths[0].tolist(), 0]]
    assert [c.tolist() for c in ranking[0].completions] == [*(c.tolist() for c in pair[0].completions), []]
    assert pair.scores is not None and pair.scores.tolist() == [[1.5, 0.0]]
    assert ranking.scores is not None and ranking.scores.tolist() == [[1.5, 0.0, 0.0]]
    half = write([{**CHAT, "margin": 1.5}, CHAT], "half.jsonl")
    assert [tokenised(half).unrated, tokenised(half, 3, "ranking").unrated] == [1, 1]


def test_a_ranking_is_dropped_whole_where_cutting_makes_answers_equal(write, tokenised) -> None:
    answers = ["sat on the mat " * 5 + end for end in "ab"]
    data = tokenised(
        write([{"prompt": ASKED, "completions": ["said", *answers]}, {"prompt": ASKED, "completions": ["a", "b"]}]),
        3,
        "ranking",
        max_length=40,
    )
    assert data.dropped == {"equal_after_truncation": 1}


def test_judgements_change_with_labels_and_scores_and_the_fingerprint_does_not(write, tokenised) -> None:
    def made(**columns: float) -> TokenizedDataset:
        return tokenised(write([CHAT, {**CHAT, **columns}]))

    plain, again = made(), made(chosen_probability=1)
    assert plain.judgements == again.judgements
    assert not plain.soft and not again.soft
    others = [
        made(chosen_probability=0.5),
        made(chosen_probability=0),
        made(margin=1),
        made(margin=0),
        made(score_chosen=2, score_rejected=1),
    ]
    assert len({plain.judgements, *(other.judgements for other in others)}) == 1 + len(others)
    assert {plain.fingerprint} == {other.fingerprint for other in others}
    assert [other.soft for other in others] == [True, True, False, False, False]


def test_equal_prompts_are_of_one_group(write, tokenised) -> None:
    def row(prompt: str, completion: str) -> dict[str, Any]:
        return {"prompt": prompt, "completion": completion, "label": True}

    rows = [row("the cat", " sat"), row("the mat", " sat"), row("the cat", " said"), row("the", " cat"), row("a", " b")]
    assert tokenised(write(rows), 1, "label").prompt_groups().tolist() == [0, 1, 0, 2, 3]
    pairs = tokenised(write([PAIR, {**PAIR, "prompt": "the mat "}, PAIR]))
    assert pairs.prompt_groups().tolist() == [0, 1, 0]


def test_an_answer_with_both_labels_is_a_contradiction(write, tokenised) -> None:
    def row(prompt: str, completion: str, label: float) -> dict[str, Any]:
        return {"prompt": prompt, "completion": completion, "label": label}

    both = [row("the cat", " sat", 1), row("the cat", " sat", 0), row("the cat", " sat", 0)]
    soft = [row("the mat", " sat", 0.75), row("the mat", " sat", 0.25)]
    # Another answer, another prompt, the same tokens parted elsewhere, the same label, no verdict.
    others = [row("the cat", " said", 0), row("the", " cat sat", 0), row("a", " b", 1), row("a", " b", 0.5)]
    assert tokenised(write([*both, *others, *soft]), 1, "label").contradictions() == 2
    assert tokenised(write([both[0], *others, both[0]]), 1, "label").contradictions() == 0


def test_columns_that_are_not_read_are_listed_and_judgements_among_them_told(write, tokenised, capsys) -> None:
    path = write([{**CHAT, "id": 1, "margin": 2, "system": None}, {**CHAT, "label": "sport", "system": "s"}])
    capsys.readouterr()
    assert tokenised(path).unread == ["id", "label", "system"]
    told = " ".join(capsys.readouterr().out.split())
    assert told.endswith(f"{path}: label not read: rows of format pairs have no use for it.")
    assert tokenised(write([CHAT])).unread == []
    assert "not read" not in capsys.readouterr().out


def test_labelled_demo_rows(shared: Path, tokenised) -> None:
    data = tokenised(shared / "data/llamafactory-demo/kto_en_demo.json", 1, "label", max_length=100_000)
    assert (len(data), data.format, data.dropped) == (300, "labels", {})
    assert data.labels.sum() == 150 and not data.soft
    pairs = tokenised(
        shared / "data/llamafactory-demo/dpo_zh_demo.json", 1, "label", source={"limit": 20}, max_length=100_000
    )
    assert (len(pairs), pairs.format, pairs.pairs_parted) == (40, "conversations", 20)
    assert pairs.labels.tolist() == [1.0, 0.0] * 20
    assert pairs[1].id.endswith("dpo_zh_demo.json:row 1 (rejected)")
