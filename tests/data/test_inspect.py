"""What the `data` command shows."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from jaxpo.batch import Example
from jaxpo.data.inspect import Fill, packing_fill, show_example, show_fill, show_summary, tokens
from jaxpo.data.pack import Packing

PAIR = {"prompt": [{"role": "user", "content": "the cat"}], "chosen": "sat on the mat", "rejected": "said hello"}


def test_tokens_carry_part_position_and_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    a, b, end = (tokenizer.encode(text)[0] for text in ("a", "b", "<|im_end|>"))
    example = Example("x:1", np.array([a, b]), (np.array([b, end]), np.array([a])))
    seen = [(t.id, t.text, t.part, t.position, t.trained) for t in tokens(example, tokenizer)]
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
    assert [t.text for t in tokens(example, tokenizer)][:3] == tokenizer.convert_ids_to_tokens(ids)


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
    show_example(example, tokenizer, edge=2)
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
    show_example(example, tokenizer, edge=None)
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
    assert "87.5% of the places in rows of 64 tokens" in said.out
    assert "3 examples are longer than training.row_length 64" in said.err


def test_the_demo_in_chinese_can_be_shown(shared: Path, tokenised, tokenizer, capsys) -> None:
    data = tokenised(shared / "data/llamafactory-demo/dpo_zh_demo.json", source={"limit": 3}, max_length=100_000)
    show_summary(data)
    show_example(data[0], tokenizer)
    assert "密歇根大学信息学院" in capsys.readouterr().out
