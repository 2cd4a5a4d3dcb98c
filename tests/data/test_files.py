"""Files are read row by row with their places; every flaw names the file and the line."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxpo.data.files import FileHashes, count_rows, read_file
from jaxpo.errors import UserError

ROWS = [{"prompt": "p", "n": 1}, {"prompt": "q\u2028r", "n": 2}]


def rows_of(path: Path) -> list[tuple[str, dict]]:
    return [(str(where), row) for where, row in read_file(path, path.name)]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_json_lines_are_named_by_line_and_blank_lines_are_passed_over(tmp_path: Path, name: str, start: bytes) -> None:
    path = write(tmp_path / name, start + "\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS).encode())
    assert rows_of(path) == [(f"{name}:1", ROWS[0]), (f"{name}:3", ROWS[1])]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_array_is_named_by_row(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, json.dumps(ROWS, indent=2))
    assert rows_of(path) == [(f"{name}:row 1", ROWS[0]), (f"{name}:row 2", ROWS[1])]


def test_a_json_object_is_one_row(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "a.json", json.dumps(ROWS[0], indent=2))) == [("a.json:row 1", ROWS[0])]


def test_json_lines_called_json_are_read_as_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", "\n".join(map(json.dumps, ROWS)))
    assert rows_of(path) == [("a.json:1", ROWS[0]), ("a.json:2", ROWS[1])]


def test_parquet_with_messages(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [(f"a.parquet:row {i + 1}", row) for i, row in enumerate(rows)]
    assert count_rows(tmp_path / "a.parquet") == 3


def test_bare_strings_are_rows_of_text_only_where_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '["one", "two"]')
    read = [row for _, row in read_file(path, "a.json", bare_text=True)]
    assert read == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(UserError, match=r"a\.json:row 1 holds a string, expected an object"):
        rows_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2,}\n', r"a\.jsonl:2 is not JSON: .* at column 9, near '\{\"a\": 2,\}'"),
        ("a.jsonl", '{"a": 1}\n{"a": ', r"a\.jsonl:2 is not JSON: .* at column 7"),
        ("a.jsonl.gz", '{"a": 1}\n\nnope\n', r"a\.jsonl\.gz:3 is not JSON: .* near 'nope'"),
        ("a.json", '[{"a": 1},\n {"a": }]', r"a\.json:2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2 holds an array, expected an object.*name it \.json"),
        ("a.jsonl", '{"a": 1}\nnull\n', r"a\.jsonl:2 holds null, expected an object"),
        ("a.jsonl", "3\n", r"a\.jsonl:1 holds a number"),
        ("a.json", '[{"a": 1}, "b"]', r"a\.json:row 2 holds a string"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a\.jsonl:2 is not UTF-8: byte 0xe9 in byte column 8"),
        ("a.json", b'[{"a": 1},\n{"a": "\xe9"}]', r"a\.json:2 is not UTF-8"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), r"a\.jsonl:1 begins as UTF-16, expected UTF-8"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1 is JSON that cannot be read"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"a\.jsonl:1 is JSON that cannot be read"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is not a whole parquet file"),
    ],
)
def test_flaws_name_file_and_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(write(tmp_path / name, content))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"plain, not gzip"])
def test_a_damaged_gzip_file_says_so(tmp_path: Path, damage) -> None:
    path = write(tmp_path / "a.jsonl.gz", "\n".join(json.dumps({"a": i * 7919}) for i in range(500)))
    path.write_bytes(damage(path.read_bytes()))
    assert count_rows(path) is None
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        rows_of(path)


def test_lines_are_counted_gzipped_or_not(tmp_path: Path) -> None:
    assert count_rows(write(tmp_path / "a.jsonl", "{}\n{}\n")) == 2
    assert count_rows(write(tmp_path / "a.jsonl.gz", "{}\n{}\n{}\n")) == 3


def test_hashes_are_remembered_by_identity_and_follow_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", "one")
    hashes = FileHashes(tmp_path / "hashes")
    first = hashes(path)
    assert not (tmp_path / "hashes").exists(), "a file that may still change must not be remembered"
    monkeypatch.setattr("jaxpo.data.files.SETTLED_SECONDS", -1.0)
    assert hashes(path) == first
    monkeypatch.setattr("jaxpo.data.files.hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert hashes(path) == FileHashes(tmp_path / "hashes")(path) == first
    monkeypatch.undo()
    os.utime(write(path, "two"), ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))
    assert hashes(path) != first


def test_a_hash_that_cannot_be_remembered_is_told_and_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", "one")
    (tmp_path / "hashes").touch()
    monkeypatch.setattr("jaxpo.data.files.SETTLED_SECONDS", -1.0)
    assert FileHashes(tmp_path / "hashes")(path) == FileHashes(tmp_path / "elsewhere")(path)
    assert "cannot remember the hash of" in capsys.readouterr().err
