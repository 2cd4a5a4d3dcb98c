"""Sources: what a path in data.train may be, and what is said of one that is nothing."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from jaxpo.config import DataSource
from jaxpo.data import sources
from jaxpo.data.files import FileHashes
from jaxpo.errors import UserError

ROWS = [{"text": f"row {i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def read(path: Path | str, **fields: Any) -> list[tuple[str, dict]]:
    return [(str(where), row) for where, row in sources.read(DataSource(path=str(path), **fields))]


def write_lines(path: Path, rows=ROWS) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_limit_is_the_first_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl.gz")
    assert read(path, limit=2) == [(f"{path}:1", ROWS[0]), (f"{path}:2", ROWS[1])]
    assert len(read(path)) == 5


def test_a_row_past_the_limit_is_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nbroken\n')
    assert len(read(path, limit=1)) == 1
    with pytest.raises(UserError, match=":2 is not JSON"):
        read(path)


def test_saved_datasets_alone_and_by_split(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "alone"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "alone")[1] == (f"{tmp_path}/alone/train:row 2", ROWS[1])
    assert read(tmp_path / "splits", split="test") == [(f"{tmp_path}/splits/test:row 1", ROWS[1])]
    assert sources.open_rows(DataSource(path=str(tmp_path / "alone"))).count() == 5
    with pytest.raises(UserError, match=r"no split 'dev' \(data\.\*\.split\), expected one of test, train"):
        read(tmp_path / "splits", split="dev")
    with pytest.raises(UserError, match="no split 'dev'"):
        read(tmp_path / "alone", split="dev")


def test_a_damaged_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text('{"_data_files"')
    with pytest.raises(UserError, match="saved is not a whole saved dataset"):
        read(tmp_path / "saved")


def test_a_folder_of_files_by_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "train-1.jsonl", ROWS[:2])
    write_lines(tmp_path / "train-2.jsonl", ROWS[2:])
    write_lines(tmp_path / "test.jsonl", ROWS[:1])
    where, rows = zip(*read(tmp_path), strict=True)
    assert list(rows) == ROWS
    assert where[2] == f"{tmp_path}/train-2.jsonl:1"
    assert read(tmp_path, split="test") == [(f"{tmp_path}/test.jsonl:1", ROWS[0])]
    with pytest.raises(UserError, match="has no split 'dev'"):
        read(tmp_path, split="dev")


def test_a_folder_that_only_datasets_reads(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("text\nrow 0\nrow 1\n")
    assert [row for _, row in read(tmp_path / "data")] == ROWS[:2]


def test_generated_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows(name: str, split: str):
        asked.append((name, split))
        return iter(ROWS)

    monkeypatch.setattr("jaxpo.data.world.rows", rows)
    assert read("jaxpo:somewhere", split="test")[4] == ("jaxpo:somewhere/test:row 5", ROWS[4])
    assert asked == [("somewhere", "test")]


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("{tmp}/rows.jsnl", {}, r"rows\.jsnl .* does not exist\. Did you mean rows\.jsonl\?"),
        ("{tmp}/none/rows.jsonl", {}, "does not exist. There is no folder"),
        ("{tmp}/notes.txt", {}, r"no file that jaxpo reads, expected one of \.jsonl"),
        ("{tmp}/rows.jsonl", {"split": "test"}, "has no split 'test' .* A single file is one split"),
        ("{tmp}/rows.jsonl", {"name": "default"}, r"data\.\*\.name is 'default'"),
        ("{tmp}/rows.jsonl", {"revision": "main"}, r"data\.\*\.revision is 'main'"),
        ("{tmp}/empty.jsonl", {}, "empty.jsonl holds no rows"),
        ("{tmp}/blank.json", {}, "blank.json holds no rows"),
        ("{tmp}/array.json", {}, "array.json holds no rows"),
        ("{tmp}/folder", {}, "folder .* is no folder of data"),
        ("someone/some-data", {}, r"hub cannot be reached for someone/some-data .*hf download --repo-type dataset"),
    ],
)
def test_what_is_said_of_a_path_that_is_no_source(tmp_path: Path, path: str, fields: dict, message: str) -> None:
    write_lines(tmp_path / "rows.jsonl")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.json").write_text(" \n")
    (tmp_path / "array.json").write_text("[]")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        read(path.format(tmp=tmp_path), **fields)


def test_fingerprints_follow_content(tmp_path: Path) -> None:
    hashes = FileHashes(tmp_path / "hashes")

    def fingerprint(path: Path) -> str:
        return sources.open_rows(DataSource(path=str(path))).fingerprint(hashes)

    one, same, other = (tmp_path / f"{name}.jsonl" for name in "abc")
    for path, rows in ((one, ROWS), (same, ROWS), (other, [*ROWS[:4], {"text": "Row 4"}])):
        write_lines(path, rows)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    for name, rows in (("s1", ROWS), ("s2", ROWS[:4])):
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
    assert fingerprint(tmp_path / "s1") != fingerprint(tmp_path / "s2")
