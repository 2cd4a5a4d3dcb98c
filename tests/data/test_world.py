"""The generated customer-service world: its splits, its answers, its determinism."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from jaxpo.data import world
from jaxpo.errors import UserError

NAME = "customer-service"


def said(row: world.Row, column: str) -> str:
    [message] = row[column]
    assert message["role"] == ("user" if column == "prompt" else "assistant")
    return message["content"]


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def test_splits_have_the_columns_and_sizes_they_promise():
    for split, size in world.SPLITS.items():
        rows = world.rows(NAME, split)
        columns = {"prompt", "completion"} if split.startswith("sft") else {"prompt", "chosen", "rejected"}
        assert len(rows) == size
        assert all(row.keys() == columns for row in rows)


def test_rows_are_the_same_everywhere_and_always():
    digest = hashlib.sha256(json.dumps([world.rows(NAME, split) for split in world.SPLITS]).encode()).hexdigest()
    assert digest == "f6e301bbe5aeba2a8fe6bd866b7ae0ce23ea1d5169716f1779a4d805ff864f67"
    assert world.rows(NAME, "train") != world.rows(NAME, "train", seed=1)


@pytest.mark.parametrize("seed", [0, 1])
def test_test_prompts_share_no_combination_with_training_prompts(seed: int):
    trained = {c for split in ("sft-train", "train") for c in world.combinations(split, seed)}
    tested = {c for split in ("sft-test", "test") for c in world.combinations(split, seed)}
    assert not trained & tested
    # Held out are combinations; the parts of each are well known from training.
    for part in ("language", "situation", "item", "question", "frame"):
        assert {getattr(c, part) for c in tested} <= {getattr(c, part) for c in trained}
    for split in world.SPLITS:
        times = Counter(world.combinations(split, seed)).values()
        assert max(times) - min(times) <= 1


def test_no_prompt_of_a_test_split_is_a_training_prompt():
    trained = {said(row, "prompt") for split in ("sft-train", "train") for row in world.rows(NAME, split)}
    tested = {said(row, "prompt") for split in ("sft-test", "test") for row in world.rows(NAME, split)}
    assert not trained & tested


def test_prompts_mix_languages_situations_and_products():
    for split in world.SPLITS:
        counts = Counter(c.language for c in world.combinations(split))
        assert 0.4 < counts["zh"] / counts.total() < 0.6
        assert len({(c.language, c.situation) for c in world.combinations(split)}) == 24
        assert len({(c.language, c.item) for c in world.combinations(split)}) == 24


def test_both_answers_name_the_product_in_the_language_of_the_question():
    for combination, row in zip(world.combinations("train"), world.rows(NAME, "train"), strict=True):
        item = world.LANGUAGES[combination.language].items[combination.item]
        for column in ("prompt", "chosen", "rejected"):
            text = said(row, column)
            assert item in text
            assert is_chinese(text) == (combination.language == "zh")
            assert "{" not in text
            assert text == text.strip()


def test_chosen_answers_are_polite_and_rejected_ones_curt():
    for combination, row in zip(world.combinations("test"), world.rows(NAME, "test"), strict=True):
        language = world.LANGUAGES[combination.language]
        for column, tone in (("chosen", language.polite), ("rejected", language.curt)):
            openings = [*tone.openings, *(tone.by_name.format(name=name) for name in language.names)]
            assert any(said(row, column).startswith(opening) for opening in openings)


def test_customers_are_called_by_the_name_they_gave():
    called = 0
    for combination, row in zip(world.combinations("train"), world.rows(NAME, "train"), strict=True):
        names = [name for name in world.LANGUAGES[combination.language].names if name in said(row, "prompt")]
        for column in ("chosen", "rejected"):
            used = [name for name in world.LANGUAGES[combination.language].names if name in said(row, column)]
            assert used in ([], names)
            called += bool(used)
    assert called > 100


def test_a_fine_tuning_row_is_polite_or_curt_with_equal_chance():
    openings = tuple(opening for language in world.LANGUAGES.values() for opening in language.polite.openings)
    named = ("Dear ", *(f"{name}您好" for name in world.CHINESE.names))
    rows = world.rows(NAME, "sft-train")
    polite = sum(said(row, "completion").startswith((*openings, *named)) for row in rows)
    # Four standard deviations of a fair coin.
    assert abs(polite / len(rows) - 0.5) < 2.0 / len(rows) ** 0.5


def test_answers_have_many_forms_of_like_variety():
    pairs = world.rows(NAME, "train")
    forms = {column: len({said(row, column) for row in pairs}) for column in ("chosen", "rejected")}
    assert min(forms.values()) > 500
    lengths = {column: sum(len(said(row, column)) for row in pairs) for column in forms}
    assert 1.0 < lengths["chosen"] / lengths["rejected"] < 2.5


def test_texts_are_short_in_a_small_vocabulary(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    rows = world.rows(NAME, "sft-train")
    texts = [said(row, column) for row in rows for column in ("prompt", "completion")]
    tokenizer.train_from_iterator(texts, vocab_size=1024, show_progress=False)
    pairs = world.rows(NAME, "test")
    lengths = {c: [len(tokenizer.encode(said(row, c)).ids) for row in pairs] for c in ("prompt", "chosen", "rejected")}
    assert max(lengths["prompt"]) <= 50
    assert max(lengths["chosen"]) <= 60
    assert max(lengths["rejected"]) <= 60


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        (
            "customer-service",
            "validation",
            "has no split validation; expected one of sft-train, sft-test, train, test.",
        ),
        ("customer-servise", "train", "jaxpo:customer-servise is unknown; expected jaxpo:customer-service."),
        ("", "train", "jaxpo: is unknown"),
    ],
)
def test_unknown_worlds_and_splits_are_told(name: str, split: str, expected: str):
    with pytest.raises(UserError) as caught:
        world.rows(name, split)
    assert expected in str(caught.value)
