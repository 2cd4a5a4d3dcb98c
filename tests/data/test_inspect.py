"""What the `data` command shows."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxpo.batch import Example
from jaxpo.data.inspect import Fill, packing_fill, show_example, show_fill, show_summary, tokens
from jaxpo.data.mismatch import Mismatched
from jaxpo.data.pack import Packing

PAIR = {"prompt": [{"role": "user", "content": "the cat"}], "chosen": "sat on the mat", "rejected": "said hello"}


def test_tokens_carry_part_position_and_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    a, b, end = (tokenizer.encode(text)[0] for text in ("a", "b", "<|im_end|>"))
    example = Example("x:1", np.array([a, b]), (np.array([b, end]), np.array([a])))
    seen = [(t.id, t.text, t.part, t.position, t.trained) for t in tokens(example, tokenizer, "pair")]
    assert seen == [
        (a, "a", 0, 0, False),
        (b, "b", 0, 1, False),
        (b, "b", 1, 2, True),
        (end, "<|im_end|>", 1, 3, True),
        (a, "a", 2, 2, True),
    ]


def test_a_piece_of_a_character_is_spelt_as_in_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("龍")
    assert len(ids) == 3
    example = Example("x:1", np.array(ids), (np.array(ids),))
    assert [t.text for t in tokens(example, tokenizer, "completion")][:3] == tokenizer.convert_ids_to_tokens(ids)


def test_the_summary_counts_rows_and_lengths(write, tokenised, capsys) -> None:
    data = tokenised(write([PAIR, {**PAIR, "chosen": ""}, PAIR]))
    show_summary(data)
    shown = capsys.readouterr().out
    lines = [line.split("│")[1:-1] for line in shown.splitlines() if "│" in line]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert cells["format"] == ["pairs, through the chat template"]
    assert cells["rows read"] == ["3"]
    assert cells["examples kept"] == ["2"]
    assert cells["dropped: empty_answer"] == ["1"]
    P, (C, R) = data.prompt_lengths[0], data.completion_lengths[0]
    assert cells["chosen"] == [str(C)] * 6 + [f"{C:.1f}", str(2 * C)]
    assert cells["prompt + longest"][0] == str(P + max(C, R))
    assert cells["example"][0] == str(P + C + R)


def test_an_example_is_shown_with_its_special_tokens_and_masks(
    write, tokenised, tokenizer: PreTrainedTokenizerFast, capsys
) -> None:
    example = tokenised(write([PAIR]))[0]
    show_example(example, tokenizer, "pair", edge=2)
    shown = capsys.readouterr().out
    assert example.id in shown
    assert "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n" in shown
    assert "sat on the mat<|im_end|>" in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    P, C, R = len(example.prompt), *map(len, example.completions)
    assert rows[0][0] == "0" and rows[0][3:] == ["prompt, shared", "no"]
    assert rows[2] == ["…", "…", f"({P - 4} more)", "prompt, shared", "no"]
    assert next(row[0] for row in rows if row[3] == "rejected") == str(P)
    assert {row[4] for row in rows if row[3] in ("chosen", "rejected")} == {"yes"}
    show_example(example, tokenizer, "pair", edge=None)
    assert sum("│" in line for line in capsys.readouterr().out.splitlines()) == P + C + R


def test_packing_fill_is_tokens_over_places(write, tokenised) -> None:
    data = tokenised(write([PAIR] * 7))
    size = int(data.prompt_lengths[0] + data.completion_lengths[0].sum())
    fill = packing_fill(data, Packing(2 * size, rows=1), batch_size=4)
    # Rows of two: two rows for the first four, two for the last three.
    assert fill == Fill(fraction=7 / 8, rows_per_batch=2.0, too_long=0)
    alone = packing_fill(data, Packing(2 * size, rows=1, packed=False), batch_size=4)
    assert alone.fraction == pytest.approx(0.5)
    assert packing_fill(data, Packing(size - 1, rows=1), batch_size=4) == Fill(0.0, 0.0, 7)


def test_fill_is_said(capsys) -> None:
    show_fill(Fill(0.875, 2.0, 3), Packing(64, rows=1), batch_size=4)
    said = capsys.readouterr()
    assert "packing without the examples that fit into no row: 87.5% of the places in rows of 64 tokens" in said.out
    assert "3 examples are longer than training.row_length 64" in said.err


def test_the_demo_in_chinese_can_be_shown(shared: Path, tokenised, tokenizer, capsys) -> None:
    data = tokenised(shared / "data/llamafactory-demo/dpo_zh_demo.json", source={"limit": 3}, max_length=100_000)
    show_summary(data)
    show_example(data[0], tokenizer, "pair")
    assert "密歇根大学信息学院" in capsys.readouterr().out


ASKED = [{"role": "user", "content": "the cat"}]


def cells(shown: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    return {line[0]: line[1:] for line in lines}


def test_labels_are_counted(write, tokenised, tokenizer: PreTrainedTokenizerFast, capsys) -> None:
    rows = [{"prompt": ASKED, "completion": f"sat {i}", "label": label} for i, label in enumerate([1, 1, 0, 0.25, 0.5])]
    data = tokenised(write(rows), 1, "label")
    show_summary(data)
    seen = cells(capsys.readouterr().out)
    assert [seen[name] for name in ("desirable", "undesirable", "soft labels")] == [
        ["2"],
        ["2"],
        ["2, 0.375 on average"],
    ]
    for i, verdict in ((0, "desirable"), (2, "undesirable"), (3, "desirable with probability 0.25")):
        show_example(data[i], tokenizer, data.feedback)
        assert capsys.readouterr().out.splitlines()[1].endswith(f"rows.jsonl:{i + 1}: {verdict}")


def test_answers_with_both_labels_are_counted(write, tokenised, capsys) -> None:
    rows = [{"prompt": ASKED, "completion": "sat", "label": label} for label in (True, False)]
    show_summary(tokenised(write(rows), 1, "label"))
    assert cells(capsys.readouterr().out)["answers labelled both ways"] == ["1"]
    show_summary(tokenised(write([rows[0], {**rows[1], "completion": "said"}]), 1, "label"))
    assert "answers labelled both ways" not in cells(capsys.readouterr().out)


def test_columns_that_are_not_read_are_shown(write, tokenised, capsys) -> None:
    show_summary(tokenised(write([{**PAIR, "label": "sport", "id": 1}, PAIR])))
    assert cells(capsys.readouterr().out)["columns not read"] == ["id, label"]
    show_summary(tokenised(write([PAIR])))
    assert "columns not read" not in cells(capsys.readouterr().out)


def test_pairs_as_labelled_answers_are_counted_as_what_they_were(write, tokenised, capsys) -> None:
    data = tokenised(write([PAIR, PAIR, {**PAIR, "chosen": ""}]), 1, "label")
    capsys.readouterr()
    show_summary(data)
    seen = cells(capsys.readouterr().out)
    assert seen["pairs, read as two answers"] == ["3"]
    assert seen["rows read"] == ["3"] and seen["examples kept"] == ["5"]
    assert (seen["desirable"], seen["undesirable"]) == (["2"], ["3"])
    assert "soft labels" not in seen and "with scores" not in seen


def test_lists_are_counted_by_their_size(write, tokenised, tokenizer: PreTrainedTokenizerFast, capsys) -> None:
    rows = [
        {"prompt": ASKED, "completions": ["sat", "said hello"], "scores": [4, 1]},
        {"prompt": ASKED, "completions": ["sat", "said hello", "said"], "scores": [4, 1, 3]},
        {"prompt": ASKED, "completions": ["a", "b"], "scores": [9, 0]},
    ]
    data = tokenised(write(rows), 4, "ranking")
    show_summary(data)
    seen = cells(capsys.readouterr().out)
    assert (seen["lists of 2"], seen["lists of 3"]) == (["2"], ["1"])
    assert seen["with scores"] == ["3, the best 5 above the worst on average"]
    assert seen["answer 3"][-1] == str(data.completion_lengths[1, 2]), "lists without a third answer do not count"
    assert "answer 4" not in seen
    show_example(data[0], tokenizer, data.feedback)
    shown = capsys.readouterr().out
    assert "--- answer 1, " in shown and "tokens, score 4\n" in shown and "answer 3" not in shown


def test_soft_pairs_are_counted(write, tokenised, tokenizer: PreTrainedTokenizerFast, capsys) -> None:
    data = tokenised(write([{**PAIR, "chosen_probability": p} for p in (1, 0.75, 0)]))
    show_summary(data)
    assert cells(capsys.readouterr().out)["soft labels"] == ["2, 0.375 on average"]
    show_example(data[1], tokenizer, data.feedback)
    assert "rows.jsonl:2: in this order with probability 0.75\n" in capsys.readouterr().out


def test_an_answer_to_another_prompt_is_shown_and_not_trained_on(
    write, tokenised, tokenizer: PreTrainedTokenizerFast, capsys
) -> None:
    long = [{"role": "user", "content": "said hello there the cat sat on the mat"}]
    rows = [
        {"prompt": ASKED, "completion": "sat on the mat, said the cat", "label": True},
        {"prompt": long, "completion": "a", "label": False},
    ]
    whole = tokenised(write(rows), 1, "label")
    most = int(whole.prompt_lengths[1] + 2)
    view = Mismatched(tokenised(write(rows), 1, "label", max_length=most), most)
    show_summary(view)
    seen = cells(capsys.readouterr().out)
    assert view.cut == 1 and seen["mismatched answers cut"] == ["1"]
    assert seen["mismatched"][0] == str(view.completion_lengths[:, 1].min())
    show_example(view[0], tokenizer, view.feedback, edge=2)
    shown = capsys.readouterr().out
    assert "--- mismatched, " in shown
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert {line[4] for line in table if line[3] == "completion"} == {"yes"}
    assert {line[4] for line in table if line[3] == "mismatched"} == {"no"}
    other = [token for token in tokens(view[0], tokenizer, "label") if token.part == 2]
    assert other[0].position == len(view[0].prompt) and not any(token.trained for token in other)
