"""Files and folders are there whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from jaxpo import atomic
from jaxpo.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with atomic.new_file(tmp_path / "a") as file:
        file.write(b"after")
        assert (tmp_path / "a").read_text() == "before"
    assert (tmp_path / "a").read_text() == "after"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_fails_leaves_the_earlier_one(tmp_path: Path, error: type[BaseException]) -> None:
    atomic.write_text(tmp_path / "a", "before")
    with pytest.raises(error), atomic.new_file(tmp_path / "a") as file:
        file.write(b"half")
        raise error
    assert (tmp_path / "a").read_text() == "before"
    assert names(tmp_path) == ["a"]


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a").mkdir()
    (tmp_path / "deep/a/old").touch()
    with atomic.new_folder(tmp_path / "deep/a") as new:
        (new / "file").touch()
        assert names(tmp_path / "deep/a") == ["old"]
    assert names(tmp_path) == ["deep", "deep/a", "deep/a/file"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "deep/a").stat().st_mode & 0o777 == 0o777 & ~umask
    with atomic.new_folder(tmp_path / "new/b") as new:
        (new / "file").touch()
    assert names(tmp_path / "new") == ["b", "b/file"]


@pytest.mark.parametrize(
    ("error", "seen"), [(OSError("No space left"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_folder_that_fails_leaves_the_earlier_one(
    tmp_path: Path, error: BaseException, seen: type[BaseException]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/old").touch()
    with pytest.raises(seen), atomic.new_folder(tmp_path / "a") as new:
        (new / "file").touch()
        raise error
    assert names(tmp_path) == ["a", "a/old"]


def test_what_a_killed_writer_left_is_taken_away(tmp_path: Path) -> None:
    for left in (".a.new-x", ".a.old-x", ".ab.new-x"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "weights").touch()
    with atomic.new_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == [".ab.new-x", ".ab.new-x/weights", "a"]


def test_a_folder_where_none_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/a cannot be written"), atomic.new_folder(tmp_path / "file/a"):
        pass


def test_an_error_of_a_write_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write_text(tmp_path / "a", "text")
    assert caught.value.filename == str(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_a_folder_s_files_last_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync, replace = os.fsync, atomic.replace_folder

    def remember(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        fsync(file)

    def named(folder: Path, new: Path) -> None:
        found = {path.stat().st_ino for path in (new, *new.rglob("*"))}
        assert len(found) == 4
        assert found <= {*synced}
        replace(folder, new)
        synced.clear()

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(atomic, "replace_folder", named)
    with atomic.new_folder(tmp_path / "a") as new:
        (new / "deep").mkdir()
        (new / "deep" / "file").write_text("one")
        (new / "file").write_text("two")
    assert synced == [tmp_path.stat().st_ino]


def test_unfinished_files_of_a_killed_writer_are_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names that `new_file` gives, and no others."""
    for name in ("a", ".a", ".a.1", ".hidden.json", ".lock", ".a.new-12345678"):
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt), atomic.new_file(tmp_path / "metrics.jsonl"):
            raise KeyboardInterrupt
    assert len(names(tmp_path)) == 7
    atomic.remove_unfinished(tmp_path)
    assert names(tmp_path) == [".a", ".a.1", ".a.new-12345678", ".hidden.json", ".lock", "a"]
