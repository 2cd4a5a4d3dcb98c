"""Files and folders that are there whole or not at all, whatever kills the process."""

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from jaxpo.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8; it lasts once this returns."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; it lasts once this returns."""
    with new_file(path) as stream:
        stream.write(content)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names `path`: that of a write, on a full disk say, names no file by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write, beside `path`; it takes that name and lasts when the block ends, and goes if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with naming(path), temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Take away the files that writers in the folder left when they were killed; nobody may be writing there."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.\d+\.[0-9a-f]{8}", path.name):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a folder; there the rename itself has to be trusted.
        with suppress(OSError):
            os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, beside `folder`; it takes that name when the block ends, and goes if it fails.

    Its files last once it has the name. What bore the name is replaced, so the caller has to know that it may be. What
    an earlier process that was killed has left beside it is taken away. UserError where the file system refuses
    anything, in the block too.
    """
    with writable(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder, "new")
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        try:
            # mkdtemp lets nobody else in.
            umask = os.umask(0)
            os.umask(umask)
            new.chmod(0o777 & ~umask)
            yield new
            _sync(new)
            replace_folder(folder, new)
            _sync_folder(folder.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        _remove_leftovers(folder, "old")


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """UserError where the file system refuses anything in the block, which fills the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}.") from error


def _sync(folder: Path) -> None:
    """Make all that is in a folder last."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb") as stream, naming(path):
                os.fsync(stream.fileno())
    _sync_folder(folder)


def replace_folder(folder: Path, new: Path) -> None:
    """`new` takes the name `folder`; a kill between the two renames leaves the earlier one as .NAME.old-*."""
    if folder.exists():
        folder.rename(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    new.rename(folder)


def _remove_leftovers(folder: Path, kind: str) -> None:
    """Take away what writers that were killed have left beside the folder, a model's size each."""
    for sibling in folder.parent.iterdir():
        if sibling.name.startswith(f".{folder.name}.{kind}-"):
            shutil.rmtree(sibling)
