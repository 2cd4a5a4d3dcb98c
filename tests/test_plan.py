"""The `plan` command as a user meets it: a verdict, figures that belong together, advice that helps, clear errors."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxpo import console, launch

# Of an 8B model: nothing of it has to be there but the shape.
LARGE = """\
output_dir: {folder}/out
model:
  scratch:
    architecture:
      model_type: llama
      hidden_size: 4096
      intermediate_size: 14336
      num_hidden_layers: 32
      num_attention_heads: 32
      num_key_value_heads: 8
    tokenizer: {{vocab_size: 128256}}
data: {{train: [{{path: pairs.jsonl}}], max_length: 2048, cache_dir: {folder}/data}}
training: {{batch_size: 64, row_length: 4096, rows_per_device: 2}}
"""

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    config = tmp_path / "large.yaml"
    config.write_text(LARGE.format(folder=tmp_path))
    return config


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """`plan(CONFIG, ARGUMENTS…)`: the figures that the command writes."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def planned(*arguments: Any) -> dict[str, Any]:
        file = tmp_path / "plan.json"
        assert launch.main(["plan", *map(str, arguments), "--json", str(file)]) == 0
        return json.loads(file.read_text())

    return planned


def test_what_does_not_fit_does_with_the_change_that_is_advised(large: Path, plan: Plan) -> None:
    found = plan(large, "--topology", "h100x8", "model.remat=none")
    assert found["verdict"] == "does not fit"
    assert found["peak_bytes"] > found["usable_bytes"]
    assert found["mesh"] == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    first = found["change_first"]
    again = plan(large, "--topology", "h100x8", "model.remat=none", *first["overrides"])
    assert again["verdict"] == "fits"
    assert again["change_first"] is None
    assert again["peak_bytes"] == first["peak_bytes"]
    assert again["step_s"] == first["step_s"]
    peaks = [one["peak_bytes"] for one in found["changes"]]
    assert peaks
    assert max(peaks) < found["peak_bytes"]


def test_a_search_ranks_what_fits_and_its_first_line_is_a_config(large: Path, plan: Plan) -> None:
    found = plan(large, "--topology", "v5px16", "--search", "--tokens-per-example", "1000,500,500")
    times = [float(f"{one['step_s']:.3g}") for one in found["ranking"]]
    assert times == sorted(times)
    assert all(one["peak_bytes"] <= found["usable_bytes"] for one in found["ranking"])
    best = found["ranking"][0]
    again = plan(large, "--topology", "v5px16", "--tokens-per-example", "1000,500,500", *best["overrides"])
    assert (again["step_s"], again["peak_bytes"]) == (best["step_s"], best["peak_bytes"])
    assert again["step_s"] < 1.01 * found["step_s"]


def test_nothing_helps_where_nothing_can(large: Path, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(large, "--topology", "v5e:1x1")
    assert found["change_first"] is None
    assert "expected more devices, or larger ones" in capsys.readouterr().out


def test_bytes_and_seconds_add_up(large: Path, plan: Plan) -> None:
    found = plan(large, "--topology", "v5e:16x16", "optimizer.offload=true", "training.batch_size=512")
    kinds = found["bytes"][found["peak_phase"]]
    assert sum(kinds.values()) == pytest.approx(found["peak_bytes"])
    assert kinds["weights"] == pytest.approx(4 * found["parameters"] / 256, rel=0.01)
    assert found["host_bytes"] == pytest.approx(8 * found["parameters"] / 256, rel=0.01)
    seconds = found["seconds"]
    assert seconds["moments"] > 0
    at_once = max(seconds[name] for name in ("products", "memory", "overlapped", "host"))
    assert found["step_s"] == pytest.approx(at_once + seconds["exposed"] + seconds["update"] + seconds["moments"])
    gathered = [one for one in found["collectives"] if one["what"] == "layers' kernels"]
    assert [one["kind"] for one in gathered] == ["all-gather"]
    layers = found["parameters"] - 2 * 128_256 * 4096
    assert gathered[0]["bytes"] == pytest.approx(found["microbatches"] * 2 * 2 * layers, rel=0.01)


def test_lengths_are_told_or_assumed_or_those_of_the_data(
    tiny: Path, tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    config = [tiny / "dpo.yaml", f"output_dir={tmp_path / 'out'}", "--topology", "v5e:2x2", "mesh.fsdp=4"]
    fresh = f"data.cache_dir={tmp_path / 'data'}"
    assumed = plan(*config, fresh)
    assert "not tokenised yet" in assumed["lengths"]
    # Half of max_length, 128, for the prompt; what is left of it for each answer; 8 examples.
    assert assumed["tokens"] == 8 * (64 + 64 + 64)
    told = plan(*config, fresh, "--tokens-per-example", "10,20,30")
    assert told["tokens"] == 8 * 60
    assert launch.main(["data", *map(str, config[:2]), fresh, "--examples", "0"]) == 0
    known = plan(*config, fresh)
    assert known["lengths"] == "80 examples of data.train, as tokenised last"
    assert 0 < known["tokens"] < assumed["tokens"]
    capsys.readouterr()


def test_a_stage_that_is_not_trained_has_the_shape_it_will_have(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    quickstart = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
    found = plan(quickstart, "--topology", "h100x1")
    # 1,024 words of 96, tied; 3 layers of 96 x (96 + 2 x 48) + 96 x 96 + 3 x 96 x 256 and two norms; a norm.
    assert found["parameters"] == 1024 * 96 + 3 * (96 * 192 + 96 * 96 + 3 * 96 * 256 + 2 * 96) + 96
    assert found["verdict"] == "fits"


def test_the_devices_here_are_measured(tiny: Path, tmp_path: Path, plan: Plan) -> None:
    found = plan(tiny / "dpo.yaml", f"output_dir={tmp_path / 'out'}")
    assert found["topology"] == "cpux8"
    assert found["mesh"]["fsdp"] == 8
    assert found["seconds"]["products"] > 0


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_fits_the_terminal(
    width: int, large: Path, plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.console, "_width", width)
    plan(large, "--topology", "h100x16", "mesh.tensor=2", "--search")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith(("fits", "may fit", "does not fit"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--topology", "v9:2x2"], '--topology is "v9:2x2"; expected a kind of chip'),
        (
            ["--topology", "h100x8", "mesh.tensor=3"],
            "sequence=1, tensor=3, which cannot cover the 8 devices",
        ),
        (["--topology", "h100x8", "--tokens-per-example", "9,9"], "and 1 completions; the objective dpo has 2 of them"),
        (["--topology", "h100x8", "--tokens-per-example", "9000,9,9"], "training.row_length is 4096, but example"),
        (["--topology", "h100x8", "model.attention=splash"], "model.attention splash cannot be used here"),
        (["--topology", "h100x8", "model={path: nowhere/at/all}"], "nowhere/at/all does not exist"),
        (["--topology", "h100x8", "model={path: .}"], "has no config.json; expected a Hugging Face checkpoint"),
    ],
)
def test_a_mistake_is_one_paragraph(
    arguments: list[str],
    expected: str,
    large: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.chdir(large.parent)
    assert launch.main(["plan", str(large), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
