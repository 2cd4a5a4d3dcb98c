"""What was saved in one setting goes on in every other: the same losses and weights as of a run of one device."""

import json
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import cluster
import pytest
from train_each import train_each

from jaxpo.evaluation import plots

DRIVER = Path(__file__).with_name("train_each.py")
STEP = 4
ONLY_TRAINS = ("data.eval=[]", "training.eval_every=null")
NEVER_STOPPED = "itself, never stopped"
WEIGHTS = "the weights alone of fsdp 8"


class Setting(NamedTuple):
    """Processes, devices of each, and the mesh over all of them."""

    processes: int
    devices: int
    mesh: str


SETTINGS = {
    "one device": Setting(1, 1, "{data: 1, fsdp: 1, tensor: 1}"),
    "fsdp 8": Setting(1, 8, "{data: 1, fsdp: 8, tensor: 1}"),
    "fsdp 4 x tensor 2": Setting(1, 8, "{data: 1, fsdp: 4, tensor: 2}"),
    "4 processes of 2": Setting(4, 2, "{data: 2, fsdp: 2, tensor: 2}"),
}
# The process of the tests has eight devices itself.
HERE = ("fsdp 8", "fsdp 4 x tensor 2")


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Path]:
    """Folders of finished runs by (setting that saved step 4, setting that went on), and of each that never stopped.

    One process and four besides begin a run of their own with the weights that fsdp 8 saved. All share one reference
    table for each model, and have no more than they need. Each setting trains what it has to in one go.
    """
    folder = tmp_path_factory.mktemp("matrix")
    found = {pair: folder / " to ".join(pair).replace(" ", "-") for pair in product(SETTINGS, SETTINGS)}
    saved = {name: folder / name.replace(" ", "-") for name in SETTINGS}

    def described(to: Path, setting: Setting, after: Path | None, *more: str) -> dict[str, Any]:
        changes = (
            *more,
            f"output_dir={to}",
            f"reference.cache_dir={folder}/reference",
            f"mesh={setting.mesh}",
            *ONLY_TRAINS,
        )
        return {
            "config": str(tiny / "dpo.yaml"),
            "overrides": changes,
            "after": after and str(after),
            "step": STEP,
        }

    def train(name: str, *runs: dict[str, Any]) -> None:
        setting = SETTINGS[name]
        if name in HERE:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plots, "write", lambda records, folder: [])
                train_each(runs, None)
            return
        listed = folder / f"{name.replace(' ', '-')}.json"
        listed.write_text(json.dumps(runs))
        logs = folder / f"logs-{name.replace(' ', '-')}"
        program, timeout = (str(DRIVER),), len(runs) * cluster.TIMEOUT
        cluster.run(logs, setting.processes, setting.devices, str(listed), program=program, timeout=timeout)

    for name in ("one device", *HERE):
        train(name, described(saved[name], SETTINGS[name], None))
    # Four processes, which take the longest to start, train their own run and go on with those of all settings.
    four = "4 processes of 2"
    goes_on = {
        name: [described(found[other, name], SETTINGS[name], saved[other]) for other in SETTINGS] for name in SETTINGS
    }
    warm = {name: folder / f"{name.replace(' ', '-')}-warm" for name in ("one device", four)}
    for name, to in warm.items():
        start = f"model.path={saved['fsdp 8']}/checkpoints/{STEP}"
        goes_on[name].append(described(to, SETTINGS[name], None, start))
    train(four, described(saved[four], SETTINGS[four], None), *goes_on[four])
    for name in SETTINGS:
        if name != four:
            train(name, *goes_on[name])
    never_stopped = {(name, NEVER_STOPPED): saved[name] for name in SETTINGS}
    return found | never_stopped | {(WEIGHTS, name): to for name, to in warm.items()}


@pytest.mark.parametrize("saved", [name for name in SETTINGS if name != "one device"])
def test_every_setting_trains_as_one_device(saved: str, runs: Mapping[tuple[str, str], Path]) -> None:
    cluster.assert_same_run(runs[saved, NEVER_STOPPED], runs["one device", NEVER_STOPPED])


@pytest.mark.parametrize("on", SETTINGS)
@pytest.mark.parametrize("saved", SETTINGS)
def test_what_one_setting_saved_another_goes_on_with(saved: str, on: str, runs: Mapping[tuple[str, str], Path]) -> None:
    cluster.assert_same_run(runs[saved, on], runs["one device", NEVER_STOPPED])
    # Nothing is trained again up to the step that was saved: the lines are those of that run, clock and all.
    ours, theirs = cluster.records(runs[saved, on]), cluster.records(runs[saved, NEVER_STOPPED])
    earlier = [record for record in theirs if record["step"] <= STEP]
    assert len(earlier) == STEP
    assert ours[:STEP] == earlier


def test_several_processes_begin_with_the_weights_of_a_checkpoint(runs: Mapping[tuple[str, str], Path]) -> None:
    warm = runs[WEIGHTS, "one device"]
    cluster.assert_same_run(runs[WEIGHTS, "4 processes of 2"], warm)
    # They are other weights than the model's, and so are their reference's: the policy's, before the first step.
    first = cluster.records(warm)[0]
    assert first["logps/chosen"] != cluster.records(runs["one device", NEVER_STOPPED])[0]["logps/chosen"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
