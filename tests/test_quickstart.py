"""The README's first command, as a newcomer runs it, and the README's promises about it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = "pip install -e . && python -m jaxpo.launch train configs/quickstart.yaml"
TESTS = "pip install -e '.[test]' && pytest"


def test_the_readme_gives_both_commands_on_lines_of_their_own() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines.count(QUICKSTART) == 1
    assert lines.count(TESTS) == 1


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quickstart, in a home of its own: nothing is in any cache."""
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "jaxpo.launch", *QUICKSTART.split("jaxpo.launch ")[1].split()]
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [*command, f"output_dir={home / 'run'}"],
        cwd=ROOT,
        env={**quiet, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout
    assert "after" in done.stdout
    return home / "run"


def test_held_out_accuracy_goes_from_chance_to_nine_tenths(quickstart: Path) -> None:
    summary = json.loads((quickstart / "summary.json").read_text())
    assert 0.4 <= summary["before"]["eval_rewards/accuracies"] <= 0.6
    assert summary["after"]["eval_rewards/accuracies"] >= 0.9
    assert summary["after"]["eval_logps/accuracies"] >= 0.9
    assert summary["reference"] == {"computed": 1600, "reused": 0}


def test_greedy_answers_change(quickstart: Path) -> None:
    samples = json.loads((quickstart / "samples.json").read_text(encoding="utf-8"))
    changed = [a != b for a, b in zip(samples["before"], samples["after"], strict=True)]
    assert len(changed) == 6
    assert sum(changed) >= 4


def test_the_run_folder_is_complete(quickstart: Path) -> None:
    names = {path.name for path in quickstart.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "plots", "export", "dropped.jsonl"} <= names
    assert {"loss.png", "accuracy.png", "margins.png", "rewards.png", "kl.png"} <= {
        path.name for path in (quickstart / "plots").iterdir()
    }


def test_transformers_loads_the_export_and_continues_as_the_samples_do(quickstart: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch, which has no CPU build for this Python here")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(quickstart / "export", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "export")
    samples = json.loads((quickstart / "samples.json").read_text(encoding="utf-8"))
    for prompt, after in zip(samples["prompts"], samples["after"], strict=True):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        answer = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == after


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_its_command(config: Path) -> None:
    from jaxpo import config_file

    config_file.load(config)
    assert f"python -m jaxpo.launch train configs/{config.name}" in config.read_text(encoding="utf-8")
