import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpo.errors import UserError
from jaxpo.reference import store
from jaxpo.reference.fingerprint import TableKey, table_key
from jaxpo.reference.store import ReferenceTable, default_chunk_rows, fill

ROOT = Path(__file__).resolve().parents[2]

CHUNK_ROWS = 8
CHUNK_BYTES = CHUNK_ROWS * 2 * 4


def key_of(num_rows: int = 30, num_completions: int = 2, weights: str = "w") -> TableKey:
    return table_key(
        weights=weights,
        decoder={"num_layers": 2},
        dtype="float32",
        compute_dtype="float32",
        examples="e",
        num_rows=num_rows,
        num_completions=num_completions,
    )


KEY = key_of()


def true_values(key: TableKey) -> np.ndarray:
    rng = np.random.default_rng(key.num_rows)
    return rng.normal(-50, 20, (key.num_rows, key.num_completions)).astype(np.float32)


def computing(key: TableKey, calls: list[range]) -> Callable[[range], np.ndarray]:
    values = true_values(key)

    def compute(chunk: range) -> np.ndarray:
        calls.append(chunk)
        return values[chunk.start : chunk.stop]

    return compute


def never(chunk: range) -> np.ndarray:
    raise AssertionError(f"{chunk} was computed again")


def example_id(row: int) -> str:
    return f"pairs.jsonl:{row + 1}"


def filled(cache_dir: Path, key: TableKey = KEY) -> Path:
    """The folder of a complete table."""
    fill(cache_dir, key, computing(key, []), chunk_rows=CHUNK_ROWS)
    return cache_dir / key.digest


def partly_filled(cache_dir: Path, rows: int) -> Path:
    table = ReferenceTable.open(cache_dir, KEY, chunk_rows=CHUNK_ROWS)
    for chunk in table.chunks:
        if chunk.stop <= rows:
            table.write(chunk, true_values(KEY)[chunk.start : chunk.stop])
    return table.folder


def chunk_file(folder: Path, index: int) -> Path:
    return folder / "logps" / f"c.{index}.0"


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


def refused(cache_dir: Path, key: TableKey = KEY) -> str:
    """The message with which `fill` refuses what it finds, without computing anything."""
    with pytest.raises(UserError) as caught:
        fill(cache_dir, key, never, chunk_rows=CHUNK_ROWS, example_id=example_id)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Filling and reading


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 30, 32])
@pytest.mark.parametrize("num_completions", [1, 2, 5])
def test_a_fill_then_a_hit(num_rows: int, num_completions: int, tmp_path: Path):
    key = key_of(num_rows, num_completions)
    calls: list[range] = []
    values, computed, reused = fill(tmp_path, key, computing(key, calls), chunk_rows=CHUNK_ROWS)
    np.testing.assert_array_equal(values, true_values(key))
    assert values.dtype == np.float32 and values.shape == (num_rows, num_completions)
    assert (computed, reused) == (num_rows, 0)
    assert [row for chunk in calls for row in chunk] == list(range(num_rows))
    assert all(len(chunk) <= CHUNK_ROWS for chunk in calls)

    again, computed, reused = fill(tmp_path, key, never)
    np.testing.assert_array_equal(again, values)
    assert (computed, reused) == (0, num_rows)
    with pytest.raises(ValueError, match="read-only"):
        again += 1


def test_other_keys_have_other_tables(tmp_path: Path):
    filled(tmp_path)
    calls: list[range] = []
    other = key_of(weights="v")
    assert fill(tmp_path, other, computing(other, calls)).computed_rows == 30
    assert fill(tmp_path, KEY, never).reused_rows == 30


def test_reading_a_complete_table_writes_nothing(tmp_path: Path):
    filled(tmp_path)

    def snapshot() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}

    before = snapshot()
    time.sleep(0.02)
    fill(tmp_path, KEY, never)
    assert snapshot() == before


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(Path("~/cache"), KEY, computing(KEY, []))
    assert (tmp_path / "cache" / KEY.digest / "complete.json").exists()


def test_an_unfinished_table_is_resumed_with_its_own_chunks(tmp_path: Path):
    partly_filled(tmp_path, 16)
    calls: list[range] = []
    # The default size of a chunk may change between versions; what is computed stays good.
    values, computed, reused = fill(tmp_path, KEY, computing(KEY, calls), chunk_rows=5)
    np.testing.assert_array_equal(values, true_values(KEY))
    assert calls == [range(16, 24), range(24, 30)]
    assert (computed, reused) == (14, 16)


def test_a_compute_that_fails_keeps_what_was_done(tmp_path: Path):
    calls: list[range] = []
    compute = computing(KEY, calls)

    def failing(chunk: range) -> np.ndarray:
        if chunk.start == 16:
            raise RuntimeError("out of memory")
        return compute(chunk)

    with pytest.raises(RuntimeError, match="out of memory"):
        fill(tmp_path, KEY, failing, chunk_rows=CHUNK_ROWS)
    assert fill(tmp_path, KEY, compute).computed_rows == 14
    assert calls == [range(8), range(8, 16), range(16, 24), range(24, 30)]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_fill_in_any_order_reads_back(data: st.DataObject):
    num_rows = data.draw(st.integers(1, 40))
    num_completions = data.draw(st.integers(1, 4))
    chunk_rows = data.draw(st.integers(1, 12))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    flat = data.draw(st.lists(finite, min_size=num_rows * num_completions, max_size=num_rows * num_completions))
    expected = np.array(flat, np.float32).reshape(num_rows, num_completions)
    key = key_of(num_rows, num_completions)
    with tempfile.TemporaryDirectory() as folder:
        table = ReferenceTable.open(Path(folder), key, chunk_rows=chunk_rows)
        order = data.draw(st.permutations(table.chunks))
        done = data.draw(st.integers(0, len(order)))
        for chunk in order[:done]:
            table.write(chunk, expected[chunk.start : chunk.stop])
        assert set(table.missing_chunks()) == set(order[done:])
        calls: list[range] = []

        def compute(chunk: range) -> np.ndarray:
            calls.append(chunk)
            return expected[chunk.start : chunk.stop]

        values, computed, reused = fill(Path(folder), key, compute)
        assert calls == sorted(order[done:], key=lambda chunk: chunk.start)
        assert computed + reused == num_rows and computed == sum(map(len, order[done:]))
        assert values.tobytes() == expected.tobytes()
        assert fill(Path(folder), key, never).values.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("num_rows", "rows"),
    [(0, 64), (1, 64), (300, 64), (32_768, 64), (32_769, 128), (100_000, 256), (10_000_000, 32_768)],
)
def test_the_default_size_of_a_chunk(num_rows: int, rows: int):
    assert default_chunk_rows(num_rows) == rows
    assert num_rows <= 512 * rows


def test_a_large_table_is_read_at_once(tmp_path: Path):
    key = key_of(2_000_000, 2)
    table = ReferenceTable.open(tmp_path, key, chunk_rows=default_chunk_rows(10_000_000))
    values = np.full((table.chunk_rows, 2), -1.5, np.float32)
    for chunk in table.chunks:
        table.write(chunk, values[: len(chunk)])
    table.finish()
    start = time.perf_counter()
    assert fill(tmp_path, key, never).values.sum() == -6_000_000.0
    # About 0.03 s; ten million rows are to take less than a second.
    assert time.perf_counter() - start < 1.0


# What a table refuses


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path):
    for bad in (np.nan, np.inf, -np.inf, 1e39):
        table = ReferenceTable.open(tmp_path, KEY, chunk_rows=CHUNK_ROWS, example_id=example_id)
        values = true_values(KEY)[8:16].astype(np.float64)
        values[3, 1] = values[5, 0] = bad
        with pytest.raises(
            UserError, match=r"row 11 \(pairs.jsonl:12\).*completion 2 of 2.*2 of the 8 .*pairs.jsonl:9 to"
        ):
            table.write(range(8, 16), values)
        assert not chunk_file(table.folder, 1).exists()
        assert table.missing_chunks() == table.chunks


def test_a_wrong_chunk_or_shape_is_a_defect(tmp_path: Path):
    table = ReferenceTable.open(tmp_path, KEY, chunk_rows=CHUNK_ROWS)
    with pytest.raises(ValueError, match="not a chunk"):
        table.write(range(4, 12), np.zeros((8, 2)))
    with pytest.raises(ValueError, match="shape"):
        table.write(range(8), np.zeros((8, 3)))
    with pytest.raises(ValueError, match="shape"):
        table.write(range(24, 30), np.zeros((8, 2)))


def test_an_unfinished_table_cannot_be_read_or_finished(tmp_path: Path):
    partly_filled(tmp_path, 16)
    table = ReferenceTable.open(tmp_path, KEY, example_id=example_id)
    for use in (table.read, table.finish):
        with pytest.raises(UserError, match=r"c\.2\.0.*rows 16 to 23 \(pairs.jsonl:17 to pairs.jsonl:24\), is missing"):
            use()
    assert not table.is_complete


# Damage

POSITIONS = {"first": 0, "body": CHUNK_BYTES // 2, "last value": CHUNK_BYTES - 1, "crc": CHUNK_BYTES, "end": -1}


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS.keys())
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("complete", [True, False])
def test_a_flipped_byte_is_named(position: int, index: int, complete: bool, tmp_path: Path):
    folder = filled(tmp_path)
    if not complete:
        (folder / "complete.json").unlink()
    flip(chunk_file(folder, index), position)
    message = refused(tmp_path)
    rows = range(8 * index, min(8 * index + 8, 30))
    assert str(chunk_file(folder, index)) in message
    assert f"rows {rows[0]} to {rows[-1]} ({example_id(rows[0])} to {example_id(rows[-1])})" in message
    assert str(folder) in message


@pytest.mark.parametrize("length", [0, 1, 3, 4, CHUNK_BYTES // 2, CHUNK_BYTES, CHUNK_BYTES + 3])
@pytest.mark.parametrize("complete", [True, False])
def test_a_cut_chunk_is_named(length: int, complete: bool, tmp_path: Path):
    folder = filled(tmp_path)
    if not complete:
        (folder / "complete.json").unlink()
    file = chunk_file(folder, 2)
    file.write_bytes(file.read_bytes()[:length])
    message = refused(tmp_path)
    assert str(file) in message and "rows 16 to 23" in message


def test_a_deleted_chunk_of_a_complete_table_is_named(tmp_path: Path):
    folder = filled(tmp_path)
    chunk_file(folder, 3).unlink()
    message = refused(tmp_path)
    assert str(chunk_file(folder, 3)) in message and "rows 24 to 29" in message and "missing" in message


def test_the_advice_mends_a_damaged_chunk(tmp_path: Path):
    folder = filled(tmp_path)
    flip(chunk_file(folder, 1), 5)
    assert "delete only logps/c.1.0 and complete.json" in refused(tmp_path)
    chunk_file(folder, 1).unlink()
    assert "delete only complete.json" in refused(tmp_path)
    (folder / "complete.json").unlink()
    calls: list[range] = []
    values, computed, reused = fill(tmp_path, KEY, computing(KEY, calls))
    np.testing.assert_array_equal(values, true_values(KEY))
    assert (calls, computed, reused) == ([range(8, 16)], 8, 22)

    flip(chunk_file(folder, 1), 5)
    assert f"Delete the folder {folder}" in refused(tmp_path)
    shutil.rmtree(folder)
    assert fill(tmp_path, KEY, computing(KEY, [])).computed_rows == 30


def test_chunks_that_changed_places_are_named(tmp_path: Path):
    folder = filled(tmp_path)
    first, second, aside = chunk_file(folder, 0), chunk_file(folder, 1), folder / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    message = refused(tmp_path)
    assert str(first) in message and "rows 0 to 7" in message and "other values" in message


def test_a_chunk_of_nan_with_a_good_crc_is_named(tmp_path: Path):
    # The last chunk is padded with NaN, so written at another's place it is whole but not finite.
    folder = filled(tmp_path)
    shutil.copy(chunk_file(folder, 3), chunk_file(folder, 0))
    assert "rows 0 to 7" in refused(tmp_path)
    (folder / "complete.json").unlink()
    message = refused(tmp_path)
    assert "rows 0 to 7" in message and "not finite" in message


def test_a_folder_in_place_of_a_chunk_is_named(tmp_path: Path):
    folder = filled(tmp_path)
    chunk_file(folder, 0).unlink()
    chunk_file(folder, 0).mkdir()
    assert str(chunk_file(folder, 0)) in refused(tmp_path)


JSON_DAMAGES = {
    "empty": b"",
    "garbage": b"\x00\xff{{",
    "cut": b'{"format_version": 1, "chunk_ro',
    "list": b"[]",
    "nan": b'{"format_version": NaN}',
    "other": b'{"format_version": 1, "chunk_rows": 8}',
    "no chunk rows": b'{"format_version": 1, "chunk_rows": 0, "key": {}}',
}


@pytest.mark.parametrize("name", ["key.json", "logps/zarr.json", "complete.json"])
@pytest.mark.parametrize("damage", JSON_DAMAGES.values(), ids=JSON_DAMAGES.keys())
@pytest.mark.parametrize("complete", [True, False])
def test_garbage_in_the_json_files_is_named(name: str, damage: bytes, complete: bool, tmp_path: Path):
    folder = filled(tmp_path)
    if not complete and name != "complete.json":
        (folder / "complete.json").unlink()
    (folder / name).write_bytes(damage)
    message = refused(tmp_path)
    assert str(folder / name) in message and f"Delete the folder {folder}" in message


@pytest.mark.parametrize("name", ["key.json", "logps/zarr.json"])
def test_a_missing_json_file_of_a_complete_table_is_named(name: str, tmp_path: Path):
    folder = filled(tmp_path)
    (folder / name).unlink()
    assert str(folder / name) in refused(tmp_path)


@pytest.mark.parametrize(
    ("found", "put"),
    [
        ('"little"', '"big"'),
        ("[30,2]", "[29,2]"),
        ("[8,2]", "[4,2]"),
        ('"NaN"', "0.0"),
        ("float32", "int32"),
        (',{"name":"crc32c"}', ""),
    ],
)
def test_another_array_is_refused(found: str, put: str, tmp_path: Path):
    file = filled(tmp_path) / "logps" / "zarr.json"
    text = file.read_text()
    assert found in text
    file.write_text(text.replace(found, put))
    assert str(file) in refused(tmp_path)


def test_the_key_of_another_table_is_refused(tmp_path: Path):
    other = key_of(weights="v")
    theirs, ours = filled(tmp_path, other), filled(tmp_path)
    shutil.copy(theirs / "key.json", ours / "key.json")
    message = refused(tmp_path)
    assert str(ours / "key.json") in message and "differs in weights" in message


def test_another_table_under_this_name_is_refused(tmp_path: Path):
    theirs = filled(tmp_path, key_of(weights="v", num_rows=31))
    theirs.rename(tmp_path / KEY.digest)
    assert "differs in num_rows, weights" in refused(tmp_path)


def test_the_end_mark_of_another_table_is_refused(tmp_path: Path):
    theirs, ours = filled(tmp_path, key_of(weights="v")), filled(tmp_path)
    shutil.copy(theirs / "complete.json", ours / "complete.json")
    assert str(ours / "complete.json") in refused(tmp_path)


def test_a_newer_format_is_left_alone(tmp_path: Path):
    file = filled(tmp_path) / "key.json"
    header = json.loads(file.read_text())
    file.write_text(json.dumps(header | {"format_version": 2, "chunk_rows": "many"}))
    message = refused(tmp_path)
    assert "format 2" in message and "newer jaxpo" in message and "Delete" not in message


def test_key_json_can_be_read_by_people(tmp_path: Path):
    header = json.loads((filled(tmp_path) / "key.json").read_text())
    assert header["key"]["decoder"] == {"num_layers": 2}
    assert header["key"]["statistic"] == "completion_logprob_sum"
    assert header["format_version"] == 1 and header["chunk_rows"] == CHUNK_ROWS


# Folders that cannot be used


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "reference"


def where_no_folder_can_be(folder: Path) -> Path:
    return Path("/proc/jaxpo/reference")


def a_file_under_the_tables_name(folder: Path) -> Path:
    (folder / KEY.digest).write_text("")
    return folder


def a_folder_under_the_locks_name(folder: Path) -> Path:
    (folder / f"{KEY.digest}.lock").mkdir()
    return folder


@pytest.mark.parametrize(
    "make",
    [a_file, below_a_file, where_no_folder_can_be, a_file_under_the_tables_name, a_folder_under_the_locks_name],
)
def test_a_folder_that_cannot_be_used_is_named(make: Callable[[Path], Path], tmp_path: Path):
    cache_dir = make(tmp_path)
    message = refused(cache_dir)
    assert "reference.cache_dir" in message and str(cache_dir) in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        assert "reference.cache_dir" in refused(tmp_path / "cache")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("limit", [0, 100, 1000])
def test_a_full_disk_is_named_and_keeps_the_table_whole(limit: int, tmp_path: Path):
    # A limit on the size of files makes writes fail half way as a full disk does.
    chunk_rows = 200
    key = key_of(500)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"reference\.cache_dir.*File too large") as caught:
            fill(tmp_path, key, computing(key, []), chunk_rows=chunk_rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    calls: list[range] = []
    np.testing.assert_array_equal(
        fill(tmp_path, key, computing(key, calls), chunk_rows=chunk_rows).values, true_values(key)
    )
    assert len(calls) == 3


def test_a_disk_that_is_full_before_the_array_is_named(tmp_path: Path):
    folder = ReferenceTable.open(tmp_path, KEY).folder
    shutil.rmtree(folder / "logps")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        message = refused(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "reference.cache_dir" in message and "File too large" in message


# Several processes


def test_what_another_run_completed_meanwhile_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = partly_filled(tmp_path, 30)

    @contextmanager
    def after_another(cache_dir: Path, key: TableKey):
        ReferenceTable.open(cache_dir, key).finish()
        chunk_file(folder, 1).unlink()
        yield

    monkeypatch.setattr(store, "exclusive", after_another)
    assert "rows 8 to 15" in refused(tmp_path)


FILLER = """
import hashlib, os, signal, sys, time
from pathlib import Path
import numpy as np
from jaxpo.reference.store import fill
from tests_key import KEY, true_values

cache_dir, log, how, wait = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])

def compute(chunk):
    with log.open("a") as stream:
        stream.write(f"{chunk.start}\\n")
    if how == "die" and chunk.start >= 16:
        os.kill(os.getpid(), signal.SIGKILL)
    while how == "wait" and chunk.start >= 16 and not wait.exists():
        time.sleep(0.01)
    if how == "slow":
        time.sleep(0.01)
    return true_values[chunk.start : chunk.stop]

values, computed, reused = fill(cache_dir, KEY, compute, chunk_rows=8)
print(hashlib.sha256(values.tobytes()).hexdigest(), computed, reused, flush=True)
"""


class Fillers:
    """Processes that fill the table of one key and log the first row of every chunk they are asked to compute."""

    def __init__(self, folder: Path, key: TableKey):
        self.folder, self.key = folder, key
        self.cache_dir, self.log, self.go = folder / "cache", folder / "log", folder / "go"
        self.log.touch()
        self.values = true_values(key)
        np.save(folder / "values.npy", self.values)
        key_arguments = {
            "weights": key.weights,
            "decoder": dict(key.decoder),
            "dtype": key.dtype,
            "compute_dtype": key.compute_dtype,
            "examples": key.examples,
            "num_rows": key.num_rows,
            "num_completions": key.num_completions,
        }
        (folder / "tests_key.py").write_text(
            "import numpy as np\nfrom pathlib import Path\nfrom jaxpo.reference.fingerprint import table_key\n"
            f"KEY = table_key(**{key_arguments!r})\ntrue_values = np.load(Path(__file__).with_name('values.npy'))\n"
        )
        (folder / "filler.py").write_text(FILLER)
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, how: str) -> "subprocess.Popen[str]":
        command: list[Any] = [sys.executable, self.folder / "filler.py", self.cache_dir, self.log, how, self.go]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        self.processes.append(process)
        return process

    def logged(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()]

    def wait_for_log(self, first_row: int) -> None:
        deadline = time.monotonic() + 20
        while first_row not in self.logged():
            codes = [process.poll() for process in self.processes]
            assert None in codes and time.monotonic() < deadline, codes
            time.sleep(0.01)

    def result(self, process: "subprocess.Popen[str]") -> tuple[int, int]:
        """Computed and reused rows of a process that ends well, with the right values."""
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        digest, computed, reused = out.split()[-3:]
        assert digest == hashlib.sha256(self.values.tobytes()).hexdigest()
        return int(computed), int(reused)


@pytest.fixture
def fillers(tmp_path: Path):
    made: list[Fillers] = []

    def make(key: TableKey = KEY) -> Fillers:
        made.append(Fillers(tmp_path, key))
        return made[-1]

    yield make
    for process in (process for one in made for process in one.processes):
        process.kill()
        process.communicate()


def wait_for_line(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert text in line, line


def test_a_killed_filler_is_resumed_without_computing_again(fillers: Callable[..., Fillers]):
    many = fillers()
    killed = many.start("die")
    killed.communicate(timeout=20)
    assert killed.returncode == -signal.SIGKILL
    assert many.logged() == [0, 8, 16]
    # The dead process holds no lock: this one starts at once, with the chunk the other was at.
    assert many.result(many.start("go")) == (14, 16)
    assert many.logged() == [0, 8, 16, 16, 24]
    assert fill(many.cache_dir, KEY, never).reused_rows == 30


def test_kills_at_any_moment_lose_a_chunk_at_most(fillers: Callable[..., Fillers]):
    key = key_of(800, 2)
    many = fillers(key)
    rng = np.random.default_rng(0)
    kills = 4
    for _ in range(kills):
        done = len(many.logged())
        process = many.start("slow")
        while len(many.logged()) == done and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.02, 0.15))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    many.result(many.start("go"))
    logged = many.logged()
    assert set(logged) == set(range(0, 800, 8))
    assert len(logged) <= 100 + kills


def test_of_two_at_once_one_computes_and_the_other_reads(fillers: Callable[..., Fillers]):
    many = fillers()
    first = many.start("wait")
    many.wait_for_log(16)
    second = many.start("go")
    wait_for_line(second, "waiting")
    many.go.touch()
    assert many.result(first) == (30, 0)
    assert many.result(second) == (0, 30)
    assert many.logged() == [0, 8, 16, 24]


def test_who_waits_takes_over_from_a_dead_holder(fillers: Callable[..., Fillers]):
    many = fillers()
    first = many.start("wait")
    many.wait_for_log(16)
    second = many.start("go")
    wait_for_line(second, "waiting")
    first.kill()
    assert many.result(second) == (14, 16)
    assert many.logged() == [0, 8, 16, 16, 24]


def test_many_starting_at_the_same_time_compute_each_chunk_once(fillers: Callable[..., Fillers]):
    key = key_of(80, 2)
    many = fillers(key)
    results = [many.result(process) for process in [many.start("slow") for _ in range(4)]]
    assert sorted(results) == [(0, 80)] * 3 + [(80, 0)]
    assert many.logged() == list(range(0, 80, 8))
