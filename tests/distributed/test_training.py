"""The same run by one process and by several: the same losses, weights and files."""

import json
from pathlib import Path
from typing import Any

import cluster
import pytest
from transformers import AutoModelForCausalLM

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("processes", "mesh"),
    [(2, "{data: 1, fsdp: 1, sequence: 4}"), (4, "{data: 2, fsdp: 2, tensor: 2}")],
)
def test_several_processes_train_as_one(processes: int, mesh: str, alone: Path, tiny: Path, tmp_path: Path):
    found = cluster.run(tmp_path / "logs", processes, 2, *cluster.training(tiny, tmp_path, f"mesh={mesh}"))
    run = tmp_path / "run"
    # One of them speaks.
    assert f"on {2 * processes} cpu device(s) of {processes} processes" in found[0].printed
    assert not any("device(s)" in one.printed or "training" in one.printed for one in found[1:]), found[1].printed
    cluster.assert_same_run(run, alone)
    # Each wrote its share of the files, which the index names as that of one process does.
    assert (run / "export" / INDEX).read_text() == (alone / "export" / INDEX).read_text()
    assert len(list((run / "export").glob("*.safetensors"))) > processes
    loaded: Any = AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]
    assert json.loads((run / "samples.json").read_text()) == json.loads((alone / "samples.json").read_text())
    assert json.loads((run / "summary.json").read_text())["reference"] == {"computed": 192, "reused": 0}
