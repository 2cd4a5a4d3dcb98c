"""Several processes that load a checkpoint together read their shares of it, and each of them not much more."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from load_sharded import MEMORY, PROCESSES, make, measured


@pytest.fixture
def model() -> Iterator[Path]:
    """100 MB in several files."""
    with TemporaryDirectory(dir=MEMORY) as folder:
        make(Path(folder) / "model", 100_000_000)
        yield Path(folder) / "model"


@pytest.mark.skipif(not MEMORY.exists(), reason="reads what was touched of files in memory from /proc")
def test_each_process_reads_its_share(model: Path, tmp_path: Path) -> None:
    """Those of matrices that lie transposed in the files included, and of the fingerprint's bytes."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    found = measured(model, tmp_path / "logs")
    assert size > 90_000_000
    assert sum(one["share"] for one in found) == pytest.approx(size, rel=0.01)
    for one in found:
        assert one["same"]
        assert one["share"] < 1.01 * size / PROCESSES
        assert one["share"] <= one["read"] <= 1.1 * one["share"]
        assert one["hashed"] < 0.5 * size
    assert sum(one["hashed"] for one in found) == pytest.approx(size, rel=0.1)
    assert len({one["fingerprint"] for one in found}) == 1
