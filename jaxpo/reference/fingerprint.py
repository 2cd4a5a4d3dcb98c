"""What a reference table depends on: a checkpoint's content, and the key made of everything that can change a value.

A key must miss when any of its values could differ, and hit whenever none could; so it holds contents (of weights, of
token ids) and never names, paths or times.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpo import atomic, processes
from jaxpo.console import progress, warn
from jaxpo.errors import UserError

# To be raised by whoever changes how a log-prob comes about (attention, rotary tables, norms, accumulation of logits,
# log-softmax) by more than the rounding that another mesh or row length brings too: every stored table then misses.
NUMERICS_VERSION = 3

COMPLETION_LOGPROB_SUM = "completion_logprob_sum"
# Over as many tokens as the example's shortest completion has.
SHARED_LOGPROB_SUM = "shared_logprob_sum"

MEMO_VERSION = 1
MEMO_FILES = 1024
READ_BYTES = 4 << 20
MAX_HEADER_BYTES = 100_000_000  # what the safetensors format itself allows

# A file that was written within the last tick of its file system's clock can change again and keep its times. Two
# seconds are the coarsest tick in use (FAT, some network mounts); a file that young is hashed but not remembered.
SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class TableKey:
    """Everything that can change a value of a reference table, and nothing else. Make one with `table_key`."""

    weights: str
    decoder: Mapping[str, Any] = field(hash=False)
    adapter: str | None
    dtype: str
    compute_dtype: str
    numerics_version: int
    examples: str
    statistic: str
    num_rows: int
    num_completions: int

    @property
    def canonical(self) -> str:
        """The key as JSON: sorted, without spaces, the same for equal keys whatever made them."""
        return canonical_json(asdict(self))

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that name the table."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:32]


def table_key(
    *,
    weights: str,
    decoder: Mapping[str, Any],
    dtype: str,
    compute_dtype: str,
    examples: str,
    num_rows: int,
    num_completions: int,
    adapter: str | None = None,
    statistic: str = COMPLETION_LOGPROB_SUM,
) -> TableKey:
    """The key of the table [num_rows, num_completions] of one statistic.

    weights: `weights_fingerprint` of the checkpoint. decoder: the decoder's config, of JSON's types and tuples; a field
    that only steers speed does not belong in it. adapter: the content hash of an adapter on top of the weights. dtype,
    compute_dtype: of the weights in memory and of the matrix products. examples: a content hash of the token ids of
    every example, in order. Raises ValueError for an impossible shape and for NaN, TypeError for what JSON cannot say.
    """
    if num_rows < 0 or num_completions < 1:
        raise ValueError(f"a table of {num_rows} rows of {num_completions} completions")
    key = TableKey(
        weights=weights,
        decoder=_plain(decoder),
        adapter=adapter,
        dtype=dtype,
        compute_dtype=compute_dtype,
        numerics_version=NUMERICS_VERSION,
        examples=examples,
        statistic=statistic,
        num_rows=num_rows,
        num_completions=num_completions,
    )
    _ = key.canonical  # a value JSON cannot say shows here, where the caller can be seen
    return key


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and without spaces; ValueError for NaN, TypeError for what JSON cannot say."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    """The value as JSON reads it back, with 10000.0 and 10000 the same: checkpoints write `rope_theta` either way."""
    match value:
        case Mapping():
            return {str(name): _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


class _Part(NamedTuple):
    """A run of bytes of a file that is hashed by itself: a tensor, or the whole of a file that is not safetensors."""

    label: str
    offset: int
    length: int


def weights_fingerprint(files: Sequence[Path], memo: Path) -> str:
    """A hash of the content of a checkpoint's weight files, 64 hexadecimal digits.

    Of safetensors files it covers each tensor's name, dtype, shape and bytes, so that the same tensors in other shards,
    or in another order, have the same fingerprint; of other files (.bin) the bytes. Memory stays at some MB per core.

    `memo` is a JSON file that remembers hashes by file identity: real path, size, inode, and the times of the last
    modification and of the last status change, in ns. An edit in place that restores size and modification time is seen
    by the status-change time, which no program can set; only a clock turned back in between, or a mount that shows
    false times, can hide one. A memo that is damaged, old or cannot be written costs time, never correctness.

    Of several processes each hashes its share; the first one keeps the memo.

    Raises UserError for a file that cannot be read, is not what its suffix says, or changes while it is read.
    """
    if not files:
        raise ValueError("a fingerprint of no files")
    try:
        identities = {file: _identity(file) for file in files}
        remembered = _read_memo(memo)
        parts = {file: _recall(remembered, file, identity) for file, identity in identities.items()}
        unknown = processes.same(lambda: [n for n, file in enumerate(files) if parts[file] is None])
        now = time.time_ns()
        fresh = _hash_files([files[n] for n in unknown]) if unknown else {}
        for file in fresh:
            if _identity(file) != identities[file]:
                raise UserError(f"{file}: the file changed while its content was read; is it still being written?")
        parts |= fresh
        settled = {file: identities[file] for file in fresh if identities[file]["ctime_ns"] < now - SETTLED_NS}
        if processes.is_first():
            _remember(memo, settled, fresh)
    except OSError as error:
        raise UserError(f"{error.filename or files[0]}: cannot read the weights: {error.strerror or error}.") from error
    listing = sorted((label, digest) for known in parts.values() if known for label, digest in known.items())
    return processes.same(lambda: hashlib.sha256(canonical_json(listing).encode()).hexdigest())


def _identity(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {
        # The hub's cache keeps files under names without a suffix, so how a file was read is not in its real path.
        "format": file.suffix,
        "size": stat.st_size,
        "inode": stat.st_ino,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }


def _hash_files(files: Sequence[Path]) -> dict[Path, dict[str, str]]:
    """Label -> hash of the bytes, of every part of every file. Of several processes each reads its share of them."""
    work = [(file, part) for file in files for part in _parts(file)]
    listed = [[*part] for _, part in work]
    if processes.same(lambda: listed) != listed:
        raise UserError(
            f"{files[0].parent} is not the same for all processes: {processes.name()} has other weights there than the "
            "first one. Expected the same files on all hosts."
        )
    mine = processes.share([part.length for _, part in work])
    digests = np.zeros((len(work), hashlib.sha256().digest_size), np.uint8)
    # sha256 and reads let go of the interpreter lock, so that threads serve; one core hashes 1 to 2 GB/s.
    with (
        progress("hashing weights", total=sum(work[n][1].length for n in mine), unit="B") as shown,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for n, digest in zip(mine, pool.map(lambda n: _hash_part(*work[n]), mine), strict=True):
            digests[n] = np.frombuffer(digest, np.uint8)
            shown.advance(work[n][1].length)
    hashes: dict[Path, dict[str, str]] = {file: {} for file in files}
    for (file, part), digest in zip(work, processes.merged(digests), strict=True):
        hashes[file][part.label] = digest.tobytes().hex()
    return hashes


def _hash_part(file: Path, part: _Part) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(part.length, READ_BYTES)))
    with file.open("rb", buffering=0) as stream:
        stream.seek(part.offset)
        left = part.length
        while left:
            count = stream.readinto(buffer[: min(left, READ_BYTES)])
            if not count:
                raise UserError(f"{file}: the file is cut: {left} bytes of {part.label} are missing.")
            digest.update(buffer[:count])
            left -= count
    return digest.digest()


def _parts(file: Path) -> list[_Part]:
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        return [_Part("file", 0, size)]
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{file}: not a safetensors file, or cut: a header of {length} bytes in {size} bytes.")
        header = stream.read(length)
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        parts = []
        for name, entry in tensors.items():
            start, end = entry["data_offsets"]
            parts.append(_Part(canonical_json([name, entry["dtype"], entry["shape"]]), 8 + length + start, end - start))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a safetensors file: its header cannot be read ({error}).") from error
    for part in parts:
        if part.length < 0 or part.offset < 8 + length or part.offset + part.length > size:
            raise UserError(f"{file}: the file is cut or damaged: {part.label} does not lie within its {size} bytes.")
    return parts


def _read_memo(memo: Path) -> dict[str, Any]:
    """Real path -> entry, as far as the memo can be read; entries are checked when they are recalled."""
    try:
        content = json.loads(memo.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    match content:
        case {"version": version, "files": dict() as files} if version == MEMO_VERSION:
            return files
        case _:
            return {}


def _recall(remembered: Mapping[str, Any], file: Path, identity: Mapping[str, Any]) -> dict[str, str] | None:
    match remembered.get(str(file.resolve())):
        case {"identity": known, "parts": dict() as parts} if known == identity:
            return parts if all(isinstance(digest, str) for digest in parts.values()) else None
        case _:
            return None


def _remember(memo: Path, settled: Mapping[Path, Any], hashes: Mapping[Path, dict[str, str]]) -> None:
    if not settled:
        return
    entries = {str(file.resolve()): {"identity": settled[file], "parts": hashes[file]} for file in settled}
    # Read again: another process may have added to it meanwhile. What slips through between here and the rename is
    # hashed once more by someone, no worse.
    others = {path: entry for path, entry in _read_memo(memo).items() if path not in entries}
    newest = list({**others, **entries}.items())[-MEMO_FILES:]
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, {"version": MEMO_VERSION, "files": dict(newest)})
    except OSError as error:
        warn(f"{memo}: cannot remember the hashes of the weights, the next run hashes again: {error.strerror or error}")


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a JSON file whole or not at all; it lasts once this returns."""
    atomic.write_text(path, json.dumps(value, indent=indent, allow_nan=False))
