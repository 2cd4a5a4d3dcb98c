"""Several processes that load a checkpoint together read their shares of it, and each of them not much more."""

from pathlib import Path

import pytest
from load_sharded import PROCESSES, make, measured


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads what was touched from /proc")
def test_each_process_reads_its_share(tmp_path: Path) -> None:
    """Those of matrices that lie transposed in the files included, and of the fingerprint's bytes."""
    make(tmp_path / "model", 100_000_000)
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    found = measured(tmp_path / "model", tmp_path / "logs")
    assert size > 90_000_000
    assert sum(one["share"] for one in found) == pytest.approx(size, rel=0.01)
    for one in found:
        assert one["same"]
        assert one["share"] < 1.01 * size / PROCESSES
        assert one["share"] <= one["read"] <= 1.1 * one["share"]
        assert one["hashed"] < 0.5 * size
    assert sum(one["hashed"] for one in found) == pytest.approx(size, rel=0.02)
    assert len({one["fingerprint"] for one in found}) == 1
