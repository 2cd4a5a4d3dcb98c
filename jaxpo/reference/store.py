"""The reference table: completion log-prob sums [N, K] on disk, computed once and read as data from then on.

    cache_dir/DIGEST.lock          held by the one process that fills the table
    cache_dir/DIGEST/key.json      what the table was made of, for people and for checking
    cache_dir/DIGEST/logps/        a zarr array, a file of `chunk_rows` rows each, with a CRC at its end
    cache_dir/DIGEST/complete.json written last: a checksum of every chunk

`fill` is the way in: it reads a complete table, or fills what is missing. A chunk is there whole or not at all and
lasts once it is written, so that a killed run loses the chunk it was at. Damage is an error that names the rows.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore
from filelock import FileLock, Timeout

from jaxpo.console import progress, say
from jaxpo.errors import UserError
from jaxpo.reference.fingerprint import TableKey, canonical_json, write_json

FORMAT_VERSION = 1

KEY = "key.json"
ARRAY = "logps"
COMPLETE = "complete.json"

SECONDS_BETWEEN_TRIES = 0.2

ExampleId = Callable[[int], str]


class Filled(NamedTuple):
    """values: the table, float32 [N, K], read-only. computed_rows, reused_rows: those of this call, N together."""

    values: np.ndarray
    computed_rows: int
    reused_rows: int


@dataclass(frozen=True)
class ReferenceTable:
    """A table on disk, complete or not. Reading needs no lock; whoever writes holds `exclusive`.

    folder: where it lies. chunk_rows: rows that are written at once. example_id: row -> where the example came from.
    """

    folder: Path
    key: TableKey
    chunk_rows: int
    example_id: ExampleId | None
    array: tensorstore.TensorStore = field(repr=False)

    @classmethod
    def open(
        cls, cache_dir: Path, key: TableKey, *, chunk_rows: int | None = None, example_id: ExampleId | None = None
    ) -> "ReferenceTable":
        """The table of `key`, created if it is not there; one that is there is opened without writing anything.

        chunk_rows counts at creation only. Raises UserError if the folder cannot be used, or holds another key's table,
        one of a newer format or a damaged one.
        """
        folder = _folder(cache_dir, key)
        with _usable(cache_dir):
            if not (folder / KEY).exists():
                if (folder / ARRAY).exists() or (folder / COMPLETE).exists():
                    raise _damaged(folder, f"{folder / KEY} is missing, so what the table holds is not known")
                folder.mkdir(parents=True, exist_ok=True)
                header = {
                    "format_version": FORMAT_VERSION,
                    "chunk_rows": chunk_rows or default_chunk_rows(key.num_rows),
                    "key": asdict(key),
                }
                write_json(folder / KEY, header, indent=2)
            rows = _read_header(folder, key)
            creating = not (folder / COMPLETE).exists()
        try:
            array = tensorstore.open(_spec(folder, key, rows), open=True, create=creating).result()
        except (ValueError, OSError) as error:
            if "Error writing" in str(error):
                raise _unusable(cache_dir, _brief(error)) from error
            what = f"{folder / ARRAY / 'zarr.json'} does not describe the array of this table ({_brief(error)})"
            raise _damaged(folder, what) from error
        return cls(folder, key, rows, example_id, array)

    @property
    def is_complete(self) -> bool:
        return (self.folder / COMPLETE).exists()

    @property
    def chunks(self) -> list[range]:
        """The rows of every chunk."""
        N = self.key.num_rows
        return [range(start, min(start + self.chunk_rows, N)) for start in range(0, N, self.chunk_rows)]

    def missing_chunks(self) -> list[range]:
        """The chunks that are still to be computed. Raises UserError for one that is there and damaged."""
        values = self._values()
        missing = []
        for chunk in self.chunks:
            if np.isfinite(values[chunk.start : chunk.stop]).all():
                continue
            if self._file(chunk).exists():
                raise self._bad_chunk(chunk, "holds values that are not finite")
            missing.append(chunk)
        return missing

    def write(self, chunk: range, values: np.ndarray) -> None:
        """Store the log-prob sums [len(chunk), K] of one of `chunks`; they last once this returns.

        Raises UserError, and stores nothing, if one is not finite or the disk does not take them.
        """
        if chunk not in self.chunks:
            raise ValueError(f"{chunk} is not a chunk of {self.chunk_rows} rows of {self.key.num_rows}")
        shape = (len(chunk), self.key.num_completions)
        if np.shape(values) != shape:
            raise ValueError(f"values of shape {np.shape(values)} for a chunk of {shape}")
        with np.errstate(over="ignore"):
            values = np.asarray(values, dtype=np.float32)
        self._refuse_non_finite(chunk, values)
        try:
            self.array[chunk.start : chunk.stop].write(values).result()
        except (ValueError, OSError, RuntimeError) as error:
            raise _unusable(self.folder.parent, _brief(error)) from error

    def finish(self) -> None:
        """Declare the table complete, after checking that every row is there."""
        checksums = self._checksums(self.read())
        with _usable(self.folder.parent):
            write_json(self.folder / COMPLETE, {"digest": self.key.digest, "checksums": checksums})

    def read(self) -> np.ndarray:
        """The whole table, float32 [N, K], read-only. Raises UserError for any row that is missing or damaged."""
        expected = self._read_complete() if self.is_complete else None
        values = self._values()
        if not np.isfinite(values).all():
            for chunk in self.chunks:
                if not np.isfinite(values[chunk.start : chunk.stop]).all():
                    there = self._file(chunk).exists()
                    raise self._bad_chunk(chunk, "holds values that are not finite" if there else "is missing")
        if expected is not None:
            for chunk, stored, found in zip(self.chunks, expected, self._checksums(values), strict=True):
                if stored != found:
                    raise self._bad_chunk(chunk, "holds other values than those it was completed with")
        values.flags.writeable = False
        return values

    def _values(self) -> np.ndarray:
        try:
            return self.array.read().result()
        except (ValueError, OSError) as error:
            # Only now is it worth asking each chunk which of them it was.
            for chunk in self.chunks:
                try:
                    self.array[chunk.start : chunk.stop].read().result()
                except (ValueError, OSError) as cause:
                    raise self._bad_chunk(chunk, f"is damaged ({_brief(cause)})") from cause
            raise _damaged(self.folder, _brief(error)) from error

    def _checksums(self, values: np.ndarray) -> list[int]:
        # The array's own CRCs say that a chunk is whole; these also say that it is this chunk of this table.
        return [zlib.crc32(values[chunk.start : chunk.stop].tobytes()) for chunk in self.chunks]

    def _read_complete(self) -> list[int]:
        file = self.folder / COMPLETE
        content = _read_json(self.folder, file)
        match content:
            case {"digest": self.key.digest, "checksums": list() as checksums} if len(checksums) == len(self.chunks):
                return checksums
            case _:
                raise _damaged(self.folder, f"{file} does not belong to this table")

    def _refuse_non_finite(self, chunk: range, values: np.ndarray) -> None:
        bad = np.argwhere(~np.isfinite(values))
        if not len(bad):
            return
        row, k = (int(i) for i in bad[0])
        rows = len(np.unique(bad[:, 0]))
        raise UserError(
            f"The reference model gives {self._name(chunk[row])} a log-prob of {values[row, k]} (completion {k + 1} of "
            f"{self.key.num_completions}); {rows} of the {len(chunk)} examples in {self._names(chunk)} have no finite "
            f"log-prob and none of these was stored. Expected finite numbers: check the weights of the reference model "
            f"(dtype {self.key.dtype}, compute dtype {self.key.compute_dtype})."
        )

    def _file(self, chunk: range) -> Path:
        return self.folder / ARRAY / f"c.{chunk.start // self.chunk_rows}.0"

    def _bad_chunk(self, chunk: range, what: str) -> UserError:
        file = self._file(chunk)
        marked = [str(path.relative_to(self.folder)) for path in (file, self.folder / COMPLETE) if path.exists()]
        keep = f"; to keep the other rows delete only {' and '.join(marked)} in it" if marked else ""
        return UserError(
            f"{file}: this chunk of the reference table, {self._names(chunk)}, {what}. "
            f"Delete the folder {self.folder} and the table is computed again{keep}."
        )

    def _name(self, row: int) -> str:
        return f"row {row}" if self.example_id is None else f"row {row} ({self.example_id(row)})"

    def _names(self, chunk: range) -> str:
        names = f"rows {chunk[0]} to {chunk[-1]}"
        if self.example_id is None:
            return names
        return f"{names} ({self.example_id(chunk[0])} to {self.example_id(chunk[-1])})"


def fill(
    cache_dir: Path,
    key: TableKey,
    compute: Callable[[range], np.ndarray],
    *,
    chunk_rows: int | None = None,
    example_id: ExampleId | None = None,
) -> Filled:
    """The table of `key`, from disk as far as it is there and from `compute` for the rest.

    compute: rows -> their log-prob sums [n, K]; it is called once for each missing chunk, in order. chunk_rows: rows of
    a chunk if the table is new (the size of one that exists stays): enough for several microbatches, few enough to lose
    when a run is killed. Of several processes that fill one table at once, one computes and the others wait and read.

    Processes of one distributed computation must not all call this, since those that wait cannot compute along: one
    does, and its `compute` tells the others which rows.
    """
    if (_folder(cache_dir, key) / COMPLETE).exists():
        table = ReferenceTable.open(cache_dir, key, example_id=example_id)
        return Filled(table.read(), 0, key.num_rows)
    with exclusive(cache_dir, key):
        table = ReferenceTable.open(cache_dir, key, chunk_rows=chunk_rows, example_id=example_id)
        missing = [] if table.is_complete else table.missing_chunks()
        computed = sum(map(len, missing))
        if missing:
            _compute(table, missing, compute)
        if not table.is_complete:
            table.finish()
        return Filled(table.read(), computed, key.num_rows - computed)


def _compute(table: ReferenceTable, missing: list[range], compute: Callable[[range], np.ndarray]) -> None:
    N = table.key.num_rows
    done = N - sum(map(len, missing))
    with progress("reference log-probs", total=N, unit="examples", completed=done) as shown:
        for chunk in missing:
            table.write(chunk, compute(chunk))
            shown.advance(len(chunk))


@contextmanager
def exclusive(cache_dir: Path, key: TableKey) -> Iterator[None]:
    """Wait until no other process writes to the table of `key`, and keep others out; a holder that dies lets go."""
    folder = _folder(cache_dir, key)
    lock = FileLock(folder.with_suffix(".lock"))
    with _usable(cache_dir):
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = _take(lock)
    if not free:
        say(f"Another run is filling the reference table {folder}: waiting for it, to use what it computes.")
        with _usable(cache_dir):
            lock.acquire(poll_interval=SECONDS_BETWEEN_TRIES)
    try:
        yield
    finally:
        lock.release()


def _take(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def default_chunk_rows(num_rows: int) -> int:
    """Rows of a chunk: a power of two from 64, for at most 512 chunks, so that even a large table is read at once."""
    return max(64, 1 << (max(num_rows - 1, 0) // 512).bit_length())


def _folder(cache_dir: Path, key: TableKey) -> Path:
    return cache_dir.expanduser().absolute() / key.digest


def _spec(folder: Path, key: TableKey, chunk_rows: int) -> dict[str, Any]:
    grid = {"chunk_shape": [chunk_rows, key.num_completions]}
    metadata = {
        "shape": [key.num_rows, key.num_completions],
        "data_type": "float32",
        "fill_value": "NaN",
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    kvstore = {"driver": "file", "path": f"{folder / ARRAY}/"}
    return {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}


def _read_header(folder: Path, key: TableKey) -> int:
    """The rows of a chunk, from the key.json of a table that is the key's."""
    file = folder / KEY
    header = _read_json(folder, file)
    match header:
        case {"format_version": int(version)} if version > FORMAT_VERSION:
            raise UserError(
                f"{file}: a reference table of format {version}, written by a newer jaxpo; this one reads format "
                f"{FORMAT_VERSION}. Update jaxpo, or name another folder in reference.cache_dir."
            )
        case {"format_version": int(), "chunk_rows": int(rows), "key": dict() as found} if rows > 0:
            expected = json.loads(key.canonical)
            if canonical_json(found) == key.canonical:
                return rows
            names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise _damaged(folder, f"{file} is another table's: it differs in {', '.join(names) or 'its form'}")
        case _:
            raise _damaged(folder, f"{file} is not the key of a reference table")


def _read_json(folder: Path, file: Path) -> Any:
    try:
        return json.loads(file.read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"{file} is not valid JSON ({error})") from error
    except OSError as error:
        raise _damaged(folder, f"{file} cannot be read: {error.strerror or error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(
        f"The reference table {folder} is damaged: {what}. Delete the folder {folder} and the table is computed again."
    )


def _unusable(cache_dir: Path, why: str) -> UserError:
    return UserError(
        f"reference.cache_dir: the reference table cannot be kept in {cache_dir}: {why}. "
        "Expected a folder that can be written, with space left."
    )


@contextmanager
def _usable(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError) as error:
        # NotImplementedError: the file system knows no locks.
        raise _unusable(cache_dir, str(error)) from error


def _brief(error: BaseException) -> str:
    """What a TensorStore error says, without its status, the file we name ourselves and the spec that follows."""
    message = str(error).partition(" [")[0]
    return re.sub(r'^[A-Z_]+: |Error opening "zarr3" driver: |Error reading local file "[^"]*": ', "", message)
