"""The same run by one process and by several: the same losses, weights and files."""

import json
from pathlib import Path
from typing import Any

import cluster
from transformers import AutoModelForCausalLM

INDEX = "model.safetensors.index.json"


def test_several_processes_train_as_one(alone: Path, tiny: Path, tmp_path: Path):
    """Two of two devices, which share rows and weights; `test_resume_matrix.py` has four of them, in another mesh."""
    mesh = "mesh={data: 1, fsdp: 1, sequence: 4}"
    found = cluster.run(tmp_path / "logs", 2, 2, *cluster.training(tiny, tmp_path, mesh))
    run = tmp_path / "run"
    # One of them speaks.
    assert "on 4 cpu device(s) of 2 processes" in found[0].printed
    assert not any("device(s)" in one.printed or "training" in one.printed for one in found[1:]), found[1].printed
    cluster.assert_same_run(run, alone)
    # Each wrote its share of the files, which the index names as that of one process does.
    assert (run / "export" / INDEX).read_text() == (alone / "export" / INDEX).read_text()
    assert len(list((run / "export").glob("*.safetensors"))) > 2
    loaded: Any = AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]
    assert json.loads((run / "samples.json").read_text()) == json.loads((alone / "samples.json").read_text())
    assert json.loads((run / "summary.json").read_text())["reference"] == {"computed": 192, "reused": 0}
