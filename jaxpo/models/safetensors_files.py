"""Safetensors files read and written tensor by tensor, with errors that tell a cut file from a damaged one.

The safetensors library would hold a whole shard in memory to write it, and has no bfloat16 for numpy.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxpo.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# A header is a line or so per tensor; the library refuses larger ones too.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor in a file: where it begins, and what it is."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, mapped from the file: pages are read as they are touched and belong to the file, not to us."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def read_header(file: Path) -> dict[str, SafetensorsTensor]:
    """The tensors of a file by name. UserError where it is cut or damaged, or holds numbers jaxpo does not read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder.")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            promised = (
                f"; its header alone takes {length + 8:,}" if len(start) == 8 and length < MAX_HEADER_BYTES else ""
            )
            raise UserError(f"{file} is cut or no safetensors file: it has {size:,} bytes{promised}. Fetch it again.")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items()}
        _check_apart(tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: its header cannot be read ({error}). Fetch it again.") from error
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
    if end > size:
        lost = [name for name, tensor in tensors.items() if tensor.offset + tensor.nbytes > size]
        raise UserError(
            f"{file} is cut: its header promises {end:,} bytes, it has {size:,}; {len(lost)} of {len(tensors)} tensors "
            f"are incomplete ({name_some(lost)}). Fetch it again."
        )
    return tensors


def write(file: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], values: Iterable[np.ndarray]) -> None:
    """Write a file of `tensors` (name -> dtype, shape) whose `values` come one by one, in that order.

    It lasts once this returns.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for (name, (dtype, shape)), value in zip(tensors.items(), values, strict=True):
            if value.dtype != dtype or value.shape != shape:
                raise ValueError(f"{name} is {value.dtype} {value.shape}, announced as {dtype} {shape}")
            stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def name_some(names: Iterable[str], limit: int = 4) -> str:
    """The first names of many, for a message."""
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


def _tensor(file: Path, name: str, entry: Mapping[str, Any], data: int) -> SafetensorsTensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{file}: found {name} of type {entry['dtype']}; jaxpo reads {', '.join(DTYPES)}.")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has the shape {list(shape)} and the data_offsets {[begin, end]}")
    tensor = SafetensorsTensor(file, DTYPES[entry["dtype"]], shape, data + begin)
    if end - begin != tensor.nbytes:
        raise ValueError(f"{name} has {end - begin} bytes where its shape asks for {tensor.nbytes}")
    return tensor


def _check_apart(tensors: Mapping[str, SafetensorsTensor]) -> None:
    """Raise ValueError if two tensors share a byte."""
    placed = sorted((tensor.offset, tensor.nbytes, name) for name, tensor in tensors.items() if tensor.nbytes)
    for (offset, nbytes, name), (following, _, other) in pairwise(placed):
        if offset + nbytes > following:
            raise ValueError(f"{name} and {other} overlap")
