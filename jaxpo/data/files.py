"""Rows of local files, each with its place in the file, and the content hash of a file.

JSON Lines, JSON (an array of objects, or one object) and parquet; JSON also gzipped. Every flaw is a UserError that
names the file and the line.
"""

import gzip
import hashlib
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from jaxpo import atomic
from jaxpo.console import warn
from jaxpo.errors import UserError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
# A file changed within this many seconds may change again without its modification time telling.
SETTLED_SECONDS = 2.0


class Where(NamedTuple):
    """Where a row comes from; as text `path:LINE`, or `path:row N`, counted from 1.

    part: which of the row's answers is meant, ` (chosen)` say, where each is an example of its own.
    """

    prefix: str
    number: int
    part: str = ""

    def __str__(self) -> str:
        return f"{self.prefix}{self.number}{self.part}"


def suffix(path: Path) -> str | None:
    """The suffix by which the file is read, None where jaxpo cannot read it."""
    return next((known for known in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(known)), None)


def read_file(path: Path, shown: str, *, bare_text: bool = False) -> Iterator[tuple[Where, Row]]:
    """The rows of a file, which messages call `shown`. With `bare_text`, a string is a row {"text": string}."""
    kind = suffix(path)
    if kind == ".parquet":
        rows = _parquet(path, shown)
    elif kind in (".jsonl", ".jsonl.gz"):
        rows = _json_lines(path, shown)
    else:
        rows = _json(path, shown)
    for where, row in rows:
        if isinstance(row, dict):
            yield where, row
        elif isinstance(row, str) and bare_text:
            yield where, {"text": row}
        else:
            hints = {
                list: " If the file is one JSON array, name it .json.",
                str: " Plain strings are read with format: text.",
            }
            expected = f"expected an object with a column under each key.{hints.get(type(row), '')}"
            raise UserError(f"{where} holds {_json_type(row)}, {expected}")


def count_rows(path: Path) -> int | None:
    """About how many rows the file holds, for a progress bar; None where only reading it all would tell."""
    kind = suffix(path)
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError):
            return None  # reading will say what is wrong
    if kind in (".jsonl", ".jsonl.gz"):
        try:
            with _open(path) as stream:
                return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
        except (OSError, EOFError, zlib.error):
            return None
    return None


class FileHashes:
    """SHA-256 of files, remembered in `folder` by the file's identity: real path, size, inode, times of last change."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, path: Path) -> str:
        path = path.resolve()
        status = path.stat()
        identity = json.dumps([str(path), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns])
        memo = self._folder / hashlib.sha256(identity.encode()).hexdigest()[:32]
        if memo.exists() and len(known := memo.read_text()) == 64:
            return known
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                atomic.write_text(memo, digest)
            except OSError as error:
                warn(f"{memo}: cannot remember the hash of {path}, the next run hashes again: {error.strerror}")
        return digest


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def _byte_lines(path: Path, shown: str) -> Iterator[bytes]:
    try:
        with _open(path) as stream:
            yield from stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{shown} is not a whole gzip file: {error}. It was cut short or damaged; fetch it again."
        ) from error
    except OSError as error:
        raise UserError(f"{shown} cannot be read: {error.strerror or error}.") from error


def _decode(data: bytes, shown: str, first_line: int) -> str:
    if first_line == 1 and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{shown}:1 begins as UTF-16, expected UTF-8. Save the file as UTF-8.")
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{shown}:{line} is not UTF-8: byte 0x{data[error.start]:02x} in byte column {column} ({error.reason}). "
            "Save the file as UTF-8."
        ) from error


def _parse(text: str, shown: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        near = line[max(0, error.colno - 31) : error.colno + 29].strip()
        raise UserError(
            f"{shown}:{first_line + error.lineno - 1} is not JSON: {error.msg} at column {error.colno}, near {near!r}."
        ) from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{shown}:{first_line} is JSON that cannot be read: {error}.") from error


def _json_lines(path: Path, shown: str) -> Iterator[tuple[Where, Any]]:
    for number, line in enumerate(_byte_lines(path, shown), 1):
        text = _decode(line, shown, number)
        if not text.isspace() and text:
            yield Where(f"{shown}:", number), _parse(text, shown, number)


def _json(path: Path, shown: str) -> Iterator[tuple[Where, Any]]:
    text = _decode(b"".join(_byte_lines(path, shown)), shown, 1)
    if not text.strip():
        return
    if _is_json_lines(text):
        yield from _json_lines(path, shown)
        return
    content = _parse(text, shown, 1)
    for number, row in enumerate(content if isinstance(content, list) else [content], 1):
        yield Where(f"{shown}:row ", number), row


def _is_json_lines(text: str) -> bool:
    """Many a .json on the hub is JSON Lines: a whole object on the first line, and more after it."""
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("{") or not rest:
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _parquet(path: Path, shown: str) -> Iterator[tuple[Where, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=512):
                for row in batch.to_pylist():
                    number += 1
                    yield Where(f"{shown}:row ", number), row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown} is not a whole parquet file, after row {number}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
