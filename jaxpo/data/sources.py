"""Where rows come from: local files and folders, saved datasets, the Hugging Face hub, worlds that jaxpo generates."""

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpo.data.files import SUFFIXES, FileHashes, Row, Where, count_rows, read_file, suffix
from jaxpo.errors import UserError

if TYPE_CHECKING:
    from jaxpo.config import DataSource


class Rows(ABC):
    """The rows of one source, not read yet."""

    def __init__(self, source: "DataSource"):
        self.source = source

    @abstractmethod
    def fingerprint(self, hashes: FileHashes) -> str:
        """A hash that changes with the content of any row, `limit` left aside."""

    @abstractmethod
    def count(self) -> int | None:
        """About how many rows there are, `limit` left aside; None if unknown."""

    @abstractmethod
    def read(self) -> Iterator[tuple[Where, Row]]:
        """Every row with its place."""


def open_rows(source: "DataSource") -> Rows:
    """Find a source. Raises UserError where there is no such thing, or no such split in it."""
    if source.path.startswith("jaxpo:"):
        return GeneratedRows(source)
    path = Path(source.path).expanduser()
    if path.is_file():
        return FileRows(source, {source.path: _readable(path, source)})
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return SavedRows(source, path)
        return _folder(source, path)
    if _looks_local(source.path):
        raise UserError(f"{source.path} (data.*.path) does not exist.{_neighbour(path)}")
    return HubRows(source)


def read(source: "DataSource") -> Iterator[tuple[Where, Row]]:
    """The first `limit` rows of a source. Raises UserError on what cannot be read, and where there is no row."""
    empty = True
    for where, row in islice(open_rows(source).read(), source.limit):
        empty = False
        yield where, row
    if empty:
        raise UserError(f"{source.path} holds no rows, expected at least one.")


class FileRows(Rows):
    """Files that jaxpo reads itself, one after the other; messages call them by the keys."""

    def __init__(self, source: "DataSource", files: dict[str, Path]):
        super().__init__(source)
        self.files = files

    def fingerprint(self, hashes: FileHashes) -> str:
        try:
            return _digest([[suffix(file), hashes(file)] for file in self.files.values()])
        except OSError as error:
            raise UserError(f"{self.source.path} cannot be read: {error.strerror or error}.") from error

    def count(self) -> int | None:
        counts = [count_rows(file) for file in self.files.values()]
        return sum(n for n in counts if n is not None) if None not in counts else None

    def read(self) -> Iterator[tuple[Where, Row]]:
        bare_text = self.source.format == "text"
        for shown, file in self.files.items():
            yield from read_file(file, shown, bare_text=bare_text)


class _DatasetRows(Rows):
    """Rows of a `datasets.Dataset`."""

    def __init__(self, source: "DataSource"):
        super().__init__(source)
        self.dataset = self.load()

    @abstractmethod
    def load(self) -> Any: ...

    def fingerprint(self, hashes: FileHashes) -> str:
        return self.dataset._fingerprint

    def count(self) -> int | None:
        return len(self.dataset)

    def read(self) -> Iterator[tuple[Where, Row]]:
        prefix = f"{self.source.path}/{self.source.split}:row "
        number = 0
        for batch in self.dataset.iter(batch_size=512):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Where(prefix, number), dict(zip(names, values, strict=True))


class SavedRows(_DatasetRows):
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""

    def __init__(self, source: "DataSource", folder: Path):
        _refuse_hub_fields(source)
        self.folder = folder
        super().__init__(source)

    def load(self) -> Any:
        import datasets
        import pyarrow

        try:
            saved = datasets.load_from_disk(str(self.folder))
        except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
            raise UserError(f"{self.source.path} is not a whole saved dataset: {_one_line(error)}") from error
        if isinstance(saved, datasets.DatasetDict):
            _check_split(self.source, sorted(map(str, saved)))
            return saved[self.source.split]
        _check_split(self.source, sorted({"train", str(saved.split or "train")}))
        return saved

    def fingerprint(self, hashes: FileHashes) -> str:
        # datasets' own fingerprint says how the dataset was made, not what the files hold now.
        return _digest([hashes(Path(part["filename"])) for part in self.dataset.cache_files])


class HubRows(_DatasetRows):
    """Whatever `datasets.load_dataset` loads: a dataset of the hub, or a folder of files only datasets can read."""

    def load(self) -> Any:
        import datasets
        from datasets.exceptions import DatasetNotFoundError, DatasetsError

        source = self.source
        try:
            return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
        except DatasetNotFoundError as error:
            raise UserError(
                f"{source.path} (data.*.path) is neither a file or folder here nor a dataset on the Hugging Face hub "
                f"that you may read: {_one_line(error)}"
            ) from error
        except ConnectionError as error:
            raise UserError(
                f"The Hugging Face hub cannot be reached for {source.path} (data.*.path), which is no file or folder "
                f"here either: {_one_line(error)}. Connect (and unset HF_HUB_OFFLINE), or run `hf download "
                f"--repo-type dataset {source.path} --local-dir DIR` where there is a network and give that folder or "
                "a file of it as the path."
            ) from error
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise UserError(
                f"{source.path} (split {source.split}, name {source.name}) cannot be loaded by datasets: "
                f"{_one_line(error)}"
            ) from error


class GeneratedRows(Rows):
    """`jaxpo:NAME`: rows that code in jaxpo makes."""

    def fingerprint(self, hashes: FileHashes) -> str:
        content = hashlib.sha256()
        for _, row in self.read():
            content.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return content.hexdigest()

    def count(self) -> int | None:
        return None

    def read(self) -> Iterator[tuple[Where, Row]]:
        _refuse_hub_fields(self.source)
        world = importlib.import_module("jaxpo.data.world")
        prefix = f"{self.source.path}/{self.source.split}:row "
        rows = world.rows(self.source.path.removeprefix("jaxpo:"), self.source.split)
        for number, row in enumerate(rows, 1):
            yield Where(prefix, number), row


def _folder(source: "DataSource", path: Path) -> Rows:
    """A folder of data files; datasets knows which belong to which split, jaxpo reads them if it can."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        files = datasets.load_dataset_builder(str(path), source.name).config.data_files or {}
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(f"{source.path} (data.*.path) is no folder of data: {_one_line(error)}") from error
    _check_split(source, [str(name) for name in files])
    if source.revision is not None:
        raise _hub_only(source, "revision", source.revision)
    chosen = {file: Path(file) for file in map(str, files[source.split])}
    return FileRows(source, chosen) if all(map(suffix, chosen.values())) else HubRows(source)


def _readable(path: Path, source: "DataSource") -> Path:
    if suffix(path) is None:
        raise UserError(
            f"{source.path} (data.*.path) is no file that jaxpo reads, expected one of {', '.join(SUFFIXES)}."
        )
    _refuse_hub_fields(source)
    _check_split(source, ["train"])
    return path


def _check_split(source: "DataSource", splits: list[str]) -> None:
    if source.split not in splits:
        raise UserError(
            f"{source.path} has no split {source.split!r} (data.*.split), expected one of {', '.join(splits)}. "
            "A single file is one split, called train whatever the file's name."
        )


def _refuse_hub_fields(source: "DataSource") -> None:
    for field, value in (("name", source.name), ("revision", source.revision)):
        if value is not None:
            raise _hub_only(source, field, value)


def _hub_only(source: "DataSource", field: str, value: str) -> UserError:
    return UserError(f"data.*.{field} is {value!r} for {source.path}, but only a dataset of the hub has one.")


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or suffix(Path(path)) is not None


def _neighbour(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return f" There is no folder {path.parent} either."
    near = get_close_matches(path.name, names, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
