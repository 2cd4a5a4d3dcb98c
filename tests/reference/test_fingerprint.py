import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpo.errors import UserError
from jaxpo.reference import fingerprint
from jaxpo.reference.fingerprint import TableKey, table_key, weights_fingerprint

Tensors = dict[str, np.ndarray]


def tensors() -> Tensors:
    return {
        "embed": np.arange(24, dtype=np.float32).reshape(6, 4),
        "layers.0.w": np.arange(8, dtype=np.float16).reshape(2, 4),
        "layers.1.w": np.arange(8, dtype=np.float16).reshape(2, 4),
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.fixture
def memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The tests' files are too young to be remembered otherwise.
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -1_000_000_000)
    return tmp_path / "cache" / "weights.json"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose content is read, in order."""
    names: list[str] = []
    real = fingerprint._hash_files

    def counting(files: Any) -> Any:
        names.extend(file.name for file in files)
        return real(files)

    monkeypatch.setattr(fingerprint, "_hash_files", counting)
    return names


def saved(path: Path, content: Tensors, **metadata: str) -> Path:
    save_file(content, path, metadata or None)
    return path


def test_shards_order_and_metadata_do_not_count(tmp_path: Path, memo: Path):
    content = tensors()
    whole = saved(tmp_path / "model.safetensors", content)
    expected = weights_fingerprint([whole], memo)
    names = list(content)
    for cut in range(1, len(names)):
        first = saved(tmp_path / f"{cut}-a.safetensors", {name: content[name] for name in names[:cut]})
        second = saved(tmp_path / f"{cut}-b.safetensors", {name: content[name] for name in names[cut:]}, format="np")
        assert weights_fingerprint([first, second], memo) == expected
        assert weights_fingerprint([second, first], memo) == expected


def flip_last_bit(content: Tensors) -> None:
    content["layers.1.w"].view(np.uint8)[-1, -1] ^= 1


def rename(content: Tensors) -> None:
    content["layers.2.w"] = content.pop("layers.1.w")


def swap(content: Tensors) -> None:
    content["layers.0.w"], content["embed"] = content["embed"], content["layers.0.w"]


def reshape(content: Tensors) -> None:
    content["embed"] = content["embed"].reshape(4, 6)


def same_bytes_other_dtype(content: Tensors) -> None:
    content["layers.0.w"] = content["layers.0.w"].view(np.int16)


def drop_empty(content: Tensors) -> None:
    del content["empty"]


@pytest.mark.parametrize("change", [flip_last_bit, rename, swap, reshape, same_bytes_other_dtype, drop_empty])
def test_every_change_of_the_tensors_counts(change: Callable[[Tensors], None], tmp_path: Path, memo: Path):
    content = tensors()
    before = weights_fingerprint([saved(tmp_path / "before.safetensors", content)], memo)
    change(content)
    assert weights_fingerprint([saved(tmp_path / "after.safetensors", content)], memo) != before


def test_other_files_count_by_their_bytes(tmp_path: Path, memo: Path):
    first, second = tmp_path / "pytorch_model.bin", tmp_path / "copy.bin"
    first.write_bytes(b"weights" * 1000)
    second.write_bytes(b"weights" * 1000)
    assert weights_fingerprint([first], memo) == weights_fingerprint([second], memo)
    second.write_bytes(b"weights" * 999 + b"weighty")
    assert weights_fingerprint([first], memo) != weights_fingerprint([second], memo)


def test_large_tensors_are_streamed(tmp_path: Path, memo: Path, monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(0).integers(0, 256, (48 << 20) + 123, dtype=np.uint8)
    file = saved(tmp_path / "model.safetensors", {"w": values})
    tracemalloc.start()
    try:
        in_pieces = weights_fingerprint([file], memo)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    monkeypatch.setattr(fingerprint, "READ_BYTES", 64 << 20)
    memo.unlink()
    assert weights_fingerprint([file], memo) == in_pieces


def test_a_known_file_is_not_read_again(tmp_path: Path, memo: Path, hashed: list[str]):
    first = saved(tmp_path / "first.safetensors", tensors())
    second = saved(tmp_path / "second.safetensors", {"head": np.ones(3, np.float32)})
    alone = weights_fingerprint([first], memo)
    both = weights_fingerprint([first, second], memo)
    assert hashed == ["first.safetensors", "second.safetensors"]
    assert weights_fingerprint([first], memo) == alone
    assert weights_fingerprint([second, first], memo) == both
    assert len(hashed) == 2


def test_an_edit_that_restores_size_and_time_is_seen(tmp_path: Path, memo: Path):
    content = tensors()
    file = saved(tmp_path / "model.safetensors", content)
    stat = file.stat()
    before = weights_fingerprint([file], memo)
    time.sleep(0.05)
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert weights_fingerprint([file], memo) != before


def test_a_file_replaced_by_an_equal_one_is_read_again_and_equal(tmp_path: Path, memo: Path, hashed: list[str]):
    file = saved(tmp_path / "model.safetensors", tensors())
    before = weights_fingerprint([file], memo)
    copy = tmp_path / "copy"
    shutil.copy2(file, copy)
    copy.replace(file)
    assert weights_fingerprint([file], memo) == before
    assert len(hashed) == 2


def test_a_file_just_written_is_not_remembered(tmp_path: Path, hashed: list[str]):
    file = saved(tmp_path / "model.safetensors", tensors())
    memo = tmp_path / "weights.json"
    assert weights_fingerprint([file], memo) == weights_fingerprint([file], memo)
    assert len(hashed) == 2
    assert not memo.exists()


def test_links_without_suffix_as_the_hub_keeps_them(tmp_path: Path, memo: Path, hashed: list[str]):
    blob = saved(tmp_path / "blob", tensors())
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    copy = saved(tmp_path / "copy.safetensors", tensors())
    assert weights_fingerprint([blob], memo) != weights_fingerprint([link], memo) == weights_fingerprint([copy], memo)
    assert len(hashed) == 3


MEMOS = {
    "empty": b"",
    "garbage": b"\xff\x00{",
    "cut": b'{"version": 1, "files": {"/a": {"iden',
    "list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "files a list": b'{"version": 1, "files": [3]}',
    "newer": b'{"version": 2, "files": {}}',
}


@pytest.mark.parametrize("damage", MEMOS.values(), ids=MEMOS.keys())
def test_a_damaged_memo_costs_time_only(damage: bytes, tmp_path: Path, memo: Path, hashed: list[str]):
    file = saved(tmp_path / "model.safetensors", tensors())
    expected = weights_fingerprint([file], memo)
    memo.write_bytes(damage)
    assert weights_fingerprint([file], memo) == expected
    assert weights_fingerprint([file], memo) == expected
    assert len(hashed) == 2


@pytest.mark.parametrize("entry", [None, 3, [], {}, {"parts": {}}, "identity only", "parts of numbers"])
def test_a_damaged_entry_costs_time_only(entry: Any, tmp_path: Path, memo: Path, hashed: list[str]):
    file = saved(tmp_path / "model.safetensors", tensors())
    expected = weights_fingerprint([file], memo)
    content = json.loads(memo.read_bytes())
    (path,) = content["files"]
    identity = content["files"][path]["identity"]
    named = {"identity only": {"identity": identity}, "parts of numbers": {"identity": identity, "parts": {"w": 3}}}
    content["files"][path] = named[entry] if isinstance(entry, str) else entry
    memo.write_text(json.dumps(content))
    assert weights_fingerprint([file], memo) == expected
    assert len(hashed) == 2


def test_a_memo_that_cannot_be_written_is_a_warning(tmp_path: Path, memo: Path, capfd: pytest.CaptureFixture[str]):
    file = saved(tmp_path / "model.safetensors", tensors())
    expected = weights_fingerprint([file], memo)
    blocked = tmp_path / "a file" / "weights.json"
    blocked.parent.write_text("")
    assert weights_fingerprint([file], blocked) == expected
    assert "weights.json" in capfd.readouterr().err
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert weights_fingerprint([file], folder) == expected
    assert "folder.json" in capfd.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".folder.json")]


def test_writers_at_once_leave_a_whole_memo(tmp_path: Path, memo: Path):
    files = [saved(tmp_path / f"{i}.safetensors", {"w": np.full(4, i, np.float32)}) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda file: weights_fingerprint([file], memo), files))
    assert len(set(found)) == 16
    assert json.loads(memo.read_bytes())["version"] == 1
    assert [path.name for path in memo.parent.iterdir()] == ["weights.json"]
    assert [weights_fingerprint([file], memo) for file in files] == found


def test_the_memo_does_not_grow_without_end(tmp_path: Path, memo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fingerprint, "MEMO_FILES", 3)
    files = [saved(tmp_path / f"{i}.safetensors", {"w": np.full(4, i, np.float32)}) for i in range(5)]
    for file in files:
        weights_fingerprint([file], memo)
    assert list(json.loads(memo.read_bytes())["files"]) == [str(file) for file in files[2:]]


def cut_data(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def cut_length(file: Path) -> None:
    file.write_bytes(b"\x10\x00")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def git_lfs_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n")


def header_of(header: bytes) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))

    return write


DAMAGES = [
    cut_data,
    cut_header,
    cut_length,
    empty,
    git_lfs_pointer,
    Path.unlink,
    header_of(b"{"),
    header_of(b"[]"),
    header_of(b'{"w": 3}'),
    header_of(b'{"w": {"dtype": "F32", "shape": [2]}}'),
    header_of(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": ["a", "b"]}}'),
    header_of(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}'),
    header_of(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}'),
    header_of(b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(damage: Callable[[Path], None], tmp_path: Path, memo: Path):
    file = saved(tmp_path / "model.safetensors", tensors())
    damage(file)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        weights_fingerprint([file], memo)
    assert not memo.exists()


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path: Path, memo: Path, monkeypatch: pytest.MonkeyPatch):
    file = saved(tmp_path / "model.safetensors", tensors())
    real = fingerprint._hash_files

    def hash_then_change(files: Any) -> Any:
        hashes = real(files)
        with file.open("ab") as stream:
            stream.write(b"more")
        return hashes

    monkeypatch.setattr(fingerprint, "_hash_files", hash_then_change)
    with pytest.raises(UserError, match="changed while"):
        weights_fingerprint([file], memo)
    assert not memo.exists()


# The key


def key(**changes: Any) -> TableKey:
    values: dict[str, Any] = {
        "weights": "a" * 64,
        "decoder": {"family": "llama", "num_layers": 2, "rope": {"theta": 10000.0, "scaling": None}, "heads": (4, 2)},
        "dtype": "float32",
        "compute_dtype": "bfloat16",
        "examples": "b" * 64,
        "num_rows": 100,
        "num_completions": 2,
    }
    return table_key(**(values | changes))


CHANGES = {
    "weights": "c" * 64,
    "decoder": {"family": "llama", "num_layers": 2, "rope": {"theta": 10000.5, "scaling": None}, "heads": (4, 2)},
    "adapter": "d" * 64,
    "dtype": "bfloat16",
    "compute_dtype": "float32",
    "examples": "e" * 64,
    "statistic": "completion_logprob_mean",
    "num_rows": 101,
    "num_completions": 1,
}


def test_the_key_covers_these_and_no_more():
    # Whoever adds a field here says in CHANGES how it changes a value of the table.
    assert {field.name for field in fields(TableKey)} == {*CHANGES, "numerics_version"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_misses(name: str):
    assert key(**{name: CHANGES[name]}).digest != key().digest


def test_every_pair_of_changes_has_its_own_table():
    digests = {key().digest, *(key(**{name: value}).digest for name, value in CHANGES.items())}
    assert len(digests) == 1 + len(CHANGES)


def test_other_numerics_miss(monkeypatch: pytest.MonkeyPatch):
    before = key().digest
    monkeypatch.setattr(fingerprint, "NUMERICS_VERSION", fingerprint.NUMERICS_VERSION + 1)
    assert key().digest != before


def test_the_same_input_hits_however_it_is_written():
    decoder = {"heads": [4, 2], "rope": {"scaling": None, "theta": 10000}, "num_layers": 2, "family": "llama"}
    assert key(decoder=decoder).digest == key().digest
    assert key(decoder=decoder) == key() and hash(key(decoder=decoder)) == hash(key())


def test_true_is_not_one():
    assert key(decoder={"tied": True}).digest != key(decoder={"tied": 1}).digest


def test_the_digest_is_for_ever():
    # A new digest makes everybody's tables useless: change it only together with what a table holds.
    assert key().digest == "6b3699df7a63b664b29412422b92bf16"


def test_what_json_cannot_say_is_refused():
    with pytest.raises(TypeError):
        key(decoder={"path": Path("x")})
    with pytest.raises(ValueError, match="JSON"):
        key(decoder={"eps": float("nan")})
    with pytest.raises(ValueError, match="0 completions"):
        key(num_completions=0)
