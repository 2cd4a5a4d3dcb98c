"""What makes the reference table hit and what makes it miss, by changing one thing of a run at a time.

A hit must need no forward pass of the reference model: the function that would do one is taken away. A miss must
compute every completion of the sources concerned and no other.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpo import config_file, launch, prepare, references, run
from jaxpo.data import formats, sources
from jaxpo.data.tokenizer import train_tokenizer
from jaxpo.errors import UserError
from jaxpo.objectives.score import Scorer
from jaxpo.references import References

TRAIN, EVAL = 160, 32  # completions


class World(NamedTuple):
    """A copy of the tiny world that a test may change, with the table of its config filled."""

    folder: Path
    config: Path
    tables: Path

    def references(self, *changes: str) -> References:
        """The tables of the config with `changes`."""
        wanted = config_file.load(self.config, [f"output_dir={self.folder}/run", *changes])
        parts = prepare.prepare(wanted, self.folder)
        return references.references(parts, lambda: parts.load(parts.checkpoint))


def forbidden(*_: Any) -> Any:
    raise AssertionError("a forward pass of the reference model")


def counted(calls: list[int]) -> Callable[..., Any]:
    """In the place of the forward passes, which are slow: every log-prob is -1, and the rows asked for are counted."""

    def completion_logps(
        decoder: object, examples: Sequence[Any], scorer: Scorer, *_: object
    ) -> Callable[[range], np.ndarray]:
        def compute(chunk: range) -> np.ndarray:
            calls.append(len(chunk))
            Q = 1 + ("shared" in scorer.statistics)
            return np.full((len(chunk), Q, len(examples[0].completions)), -1.0, np.float32)

        return compute

    return completion_logps


@pytest.fixture(scope="module")
def filled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, References]:
    """The tables of dpo.yaml, computed by the model itself."""
    tables = tmp_path_factory.mktemp("filled") / "reference"
    first = World(tables.parent, tiny / "dpo.yaml", tables).references(f"reference.cache_dir={tables}")
    assert (first.computed, first.reused) == (TRAIN + EVAL, 0)
    return tables, first


@pytest.fixture
def world(tiny: Path, filled: tuple[Path, References], tmp_path: Path) -> World:
    folder = tmp_path / "world"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("data", "reference", "run*"))
    shutil.copytree(filled[0], folder / "reference")
    config = folder / "dpo.yaml"
    config.write_text(config.read_text().replace(str(tiny), str(folder)))
    return World(folder, config, folder / "reference")


HITS = {
    "learning rate": ["optimizer.learning_rate=0.5"],
    "batch size": ["training.batch_size=3"],
    "row length": ["training.row_length=512"],
    "rows per device": ["training.rows_per_device=2"],
    "output folder": ["output_dir=elsewhere"],
    "data-parallel mesh": ["mesh.data=8", "mesh.fsdp=1"],
    "mesh of three axes": ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
    "beta": ["objective.beta=0.7"],
    "objective": ["objective={name: ipo}"],
    "objective that couples examples": ["objective={name: aot}"],
    "objective that weighs pairs": ["objective={name: dpo, modifiers: [{name: wpo}, {name: nll}]}"],
    "objective that scores prompts": [
        "objective={name: mixture, terms: [{objective: {name: dpo}}, {objective: {name: sft, tokens: all}}]}"
    ],
    "remat": ["model.remat=full"],
    "no packing": ["training.packing=false"],
    "no shared prompt": ["training.share_prompt=false"],
    "seed and order": ["training.seed=5", "data.shuffle=false"],
    "course": ["training.max_steps=99", "training.eval_every=null", "training.num_epochs=2"],
    # Limits that cut nothing change no token id, and the table knows token ids, not settings.
    "max_length that cuts nothing": ["data.max_length=127"],
    "sides of a cut that does not happen": ["data.truncate_prompt=right", "data.max_prompt_length=100"],
    "cache of the data": ["data.cache_dir=other-data", "data.workers=1"],
}


@pytest.mark.parametrize("changes", HITS.values(), ids=HITS)
def test_hit(
    changes: list[str],
    world: World,
    filled: tuple[Path, References],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(references, "completion_logps", forbidden)
    found = world.references(*changes)
    assert (found.computed, found.reused) == (0, TRAIN + EVAL)
    for mine, first in ((found.train, filled[1].train), (found.eval, filled[1].eval)):
        assert mine is not None
        assert first is not None
        np.testing.assert_array_equal(mine, first)


def test_a_training_run_hits(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(references, "completion_logps", forbidden)
    run.train(config_file.load(world.config, [f"output_dir={world.folder}/run", "training.max_steps=1"]))
    summary = json.loads((world.folder / "run" / "summary.json").read_text())
    assert summary["reference"] == {"computed": 0, "reused": TRAIN + EVAL}


IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from jaxpo import config_file, prepare, references
references.completion_logps = None  # a call would be a TypeError
run = config_file.load(Path(sys.argv[1]), [f"output_dir={sys.argv[2]}"])
found = references.references(prepare.prepare(run, Path(sys.argv[2])), None)
print(found.computed, found.reused)
"""


def test_another_process_on_one_device_hits(world: World):
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(world.config), str(world.folder / "run")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, check=True, timeout=300, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines()[-1] == f"0 {TRAIN + EVAL}"


def move_everything(world: World) -> list[str]:
    (world.folder / "llama").rename(world.folder / "moved")
    (world.folder / "dpo.jsonl").rename(world.folder / "pairs.jsonl")
    return [f"model.path={world.folder}/moved", f"data.train.0.path={world.folder}/pairs.jsonl"]


def same_weights_as_reference(world: World) -> list[str]:
    shutil.copytree(world.folder / "llama", world.folder / "copy")
    return [f"reference.path={world.folder}/copy"]


def sources_change_places(world: World) -> list[str]:
    train, held_out = world.folder / "dpo.jsonl", world.folder / "dpo-eval.jsonl"
    return [f"data.train=[{{path: {held_out}}}]", f"data.eval=[{{path: {train}}}]"]


def space_between_the_keys_of_a_row(world: World) -> list[str]:
    rows = (world.folder / "dpo.jsonl").read_text()
    (world.folder / "dpo.jsonl").write_text(rows.replace('{"prompt": ', '{  "prompt":  '))
    return []


@pytest.mark.parametrize(
    "change",
    [move_everything, same_weights_as_reference, sources_change_places, space_between_the_keys_of_a_row],
    ids=lambda f: f.__name__,
)
def test_hit_wherever_things_lie(change: Callable[[World], list[str]], world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(references, "completion_logps", forbidden)
    found = world.references(*change(world))
    assert (found.computed, found.reused) == (0, TRAIN + EVAL)


def one_weight(world: World) -> list[str]:
    file = world.folder / "llama" / "model.safetensors"
    tensors = load_file(file)
    weight = tensors["model.layers.1.mlp.down_proj.weight"].copy()
    weight[3, 5] = np.nextafter(weight[3, 5], np.float32(9.0))
    save_file(tensors | {"model.layers.1.mlp.down_proj.weight": weight}, file, {"format": "pt"})
    return []


def one_weight_of_another_reference(world: World) -> list[str]:
    shutil.copytree(world.folder / "llama", world.folder / "other")
    one_weight(world._replace(folder=world.folder))
    (world.folder / "llama").rename(world.folder / "changed")
    (world.folder / "other").rename(world.folder / "llama")
    return [f"reference.path={world.folder}/changed"]


def rotary_base(world: World) -> list[str]:
    file = world.folder / "llama" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    file.write_text(json.dumps(config))
    return []


def another_tokenizer(world: World) -> list[str]:
    texts: list[str] = []
    wanted = config_file.load(world.config, ["output_dir=x"]).data.train[0]
    for where, row in sources.read(wanted):
        record = formats.Record(where, row)
        for parsed in formats.parse(record, formats.detect(record, "auto", "pair", 2), 2):
            texts += formats.texts(parsed)
    train_tokenizer(texts, 390, "chatml").save_pretrained(str(world.folder / "llama"))
    return []


def a_chat_template_of_ones_own(world: World) -> list[str]:
    file = world.folder / "template.jinja"
    file.write_text((world.folder / "llama" / "chat_template.jinja").read_text().replace("assistant", "helper"))
    return [f"data.chat_template={file}"]


MISSES: dict[str, Callable[[World], list[str]]] = {
    "one weight": one_weight,
    "one weight of another reference": one_weight_of_another_reference,
    "rotary base": rotary_base,
    "dtype": lambda _: ["model.dtype=bfloat16"],
    "compute dtype": lambda _: ["model.compute_dtype=bfloat16"],
    "max_length": lambda _: ["data.max_length=70"],
    "max_prompt_length": lambda _: ["data.max_prompt_length=12"],
    "built-in chat template": lambda _: ["data.chat_template=zephyr"],
    "chat template": a_chat_template_of_ones_own,
    "tokenizer": another_tokenizer,
}


@pytest.mark.parametrize("change", MISSES.values(), ids=MISSES)
def test_miss(change: Callable[[World], list[str]], world: World, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    monkeypatch.setattr(references, "completion_logps", counted(calls))
    changes = change(world)
    found = world.references(*changes)
    assert (found.computed, found.reused) == (TRAIN + EVAL, 0)
    assert 2 * sum(calls) == TRAIN + EVAL
    monkeypatch.setattr(references, "completion_logps", forbidden)
    assert world.references(*changes).reused == TRAIN + EVAL


def test_the_side_of_a_cut_misses(world: World, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    monkeypatch.setattr(references, "completion_logps", counted(calls))
    short = ["data.max_prompt_length=12"]
    assert world.references(*short, "data.truncate_prompt=left").computed == TRAIN + EVAL
    assert world.references(*short, "data.truncate_prompt=right").computed == TRAIN + EVAL
    assert world.references(*short, "data.truncate_prompt=left").computed == 0


def one_character(rows: list[str]) -> list[str]:
    row = json.loads(rows[41])
    text = row["rejected"][0]["content"]
    row["rejected"][0]["content"] = text[:-1] + "!"
    assert text[-1] != "!"
    return [*rows[:41], json.dumps(row), *rows[42:]]


def other_order(rows: list[str]) -> list[str]:
    return [rows[1], rows[0], *rows[2:]]


def chosen_for_rejected(rows: list[str]) -> list[str]:
    row = json.loads(rows[0])
    return [json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}), *rows[1:]]


@pytest.mark.parametrize("change", [one_character, other_order, chosen_for_rejected], ids=lambda f: f.__name__)
def test_a_changed_row_misses_for_its_source_alone(
    change: Callable[[list[str]], list[str]], world: World, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    monkeypatch.setattr(references, "completion_logps", counted(calls))
    file = world.folder / "dpo.jsonl"
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    found = world.references()
    assert (found.computed, found.reused) == (TRAIN, EVAL)
    assert 2 * sum(calls) == TRAIN


def test_another_source_is_the_only_one_computed(world: World, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    monkeypatch.setattr(references, "completion_logps", counted(calls))
    rows = (world.folder / "dpo.jsonl").read_text().splitlines()
    (world.folder / "more.jsonl").write_text("\n".join(rows[:10]) + "\n")
    found = world.references(f"data.train=[{{path: {world.folder}/dpo.jsonl}}, {{path: {world.folder}/more.jsonl}}]")
    assert (found.computed, found.reused) == (20, TRAIN + EVAL)
    assert calls == [10]
    assert found.train is not None
    assert found.train.shape == (90, 1, 2)


def tables_on_disk(world: World) -> dict[str, int]:
    """The files of all tables with the time of their last change."""
    files = [path for path in world.tables.rglob("*") if path.is_file() and path.name != "weights.json"]
    return {str(path.relative_to(world.tables)): path.stat().st_mtime_ns for path in files}


def with_ld(alpha: float) -> str:
    return f"objective={{name: dpo, modifiers: [{{name: ld, alpha: {alpha}}}]}}"


def test_ld_computes_a_second_table_and_reuses_the_first(
    world: World, filled: tuple[Path, References], monkeypatch: pytest.MonkeyPatch
):
    before = tables_on_disk(world)
    found = world.references(with_ld(0.5))
    assert (found.computed, found.reused) == (TRAIN + EVAL, 0)
    after = tables_on_disk(world)
    assert {name: after[name] for name in before} == before
    keys = [json.loads(path.read_text())["key"] for path in world.tables.glob("*/key.json")]
    assert sorted(key["statistic"] for key in keys) == 2 * ["completion_logprob_sum"] + 2 * ["shared_logprob_sum"]

    assert found.train is not None
    assert filled[1].train is not None
    np.testing.assert_array_equal(found.train[:, 0], filled[1].train[:, 0])
    # Of an example's shorter completion both statistics are the same, of the longer one the second has fewer tokens.
    assert np.count_nonzero(found.train[:, 0] == found.train[:, 1]) >= len(found.train)
    assert np.all(found.train[:, 1] >= found.train[:, 0])
    assert np.any(found.train[:, 1] > found.train[:, 0] + 1.0)

    monkeypatch.setattr(references, "completion_logps", forbidden)
    again = world.references(with_ld(0.1))
    assert (again.computed, again.reused) == (0, TRAIN + EVAL)
    assert again.train is not None
    np.testing.assert_array_equal(again.train, found.train)
    assert world.references().computed == 0
    assert tables_on_disk(world) == after


def test_mismatched_answers_have_a_table_of_their_own(world: World, monkeypatch: pytest.MonkeyPatch):
    """Each pair is two labelled answers, each with another prompt's answer beside it for KTO."""
    calls: list[int] = []
    monkeypatch.setattr(references, "completion_logps", counted(calls))
    kto = "objective={name: kto}"
    found = world.references(kto)
    assert (found.computed, found.reused) == (2 * (TRAIN + EVAL), 0)
    assert sum(calls) == TRAIN + EVAL
    assert found.train is not None
    assert found.train.shape == (TRAIN, 1, 2)
    # Not that of the answers alone, which the others over labels share.
    assert world.references("objective={name: bco}").computed == TRAIN + EVAL
    assert world.references("objective={name: apo_zero_unpaired}").computed == 0
    monkeypatch.setattr(references, "completion_logps", forbidden)
    for change in ("training.seed=5", "training.batch_size=3", "data.shuffle=false", "objective.desirable_weight=1.3"):
        again = world.references(kto, change)
        assert (again.computed, again.reused) == (0, 2 * (TRAIN + EVAL)), change


def test_another_length_of_mismatched_answers_misses(world: World, monkeypatch: pytest.MonkeyPatch):
    """max_length may cut a mismatched answer alone: its prompt is longer than the one it was given to."""
    calls: list[int] = []
    monkeypatch.setattr(references, "completion_logps", counted(calls))
    kto = "objective={name: kto}"
    world.references(kto)
    assert world.references(kto, "data.max_length=127").computed == 0
    assert world.references(kto, "data.max_length=70").computed == 2 * (TRAIN + EVAL)


def train_table(world: World) -> Path:
    """The folder of the train source's table: the one of two chunks."""
    (found,) = (file.parent.parent for file in world.tables.glob("*/logps/c.1.0"))
    return found


def flip(chunk: Path) -> None:
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flipped byte", "missing chunk"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_chunk_is_an_error_that_names_it(
    number: int,
    damage: Callable[[Path], None],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(references, "completion_logps", forbidden)
    chunk = train_table(world) / "logps" / f"c.{number}.0"
    damage(chunk)
    with pytest.raises(UserError) as caught:
        world.references()
    assert str(chunk) in str(caught.value)

    out = world.folder / "run"
    assert launch.main(["train", str(world.config), f"output_dir={out}"]) == 2
    error = capsys.readouterr().err
    assert str(chunk) in error
    assert f"dpo.jsonl:{[1, 65][number]}" in error
    assert "Traceback" not in error
    assert not (out / "metrics.jsonl").exists()


def test_the_answers_that_there_are_count(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of two in a table with places for four: what is not there is not computed either."""
    lists = world.folder / "lists.jsonl"
    pairs = [json.loads(line) for line in (world.folder / "dpo.jsonl").read_text().splitlines()]
    rows = [{"prompt": p["prompt"], "completions": [p["chosen"], p["rejected"]]} for p in pairs]
    lists.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(references, "completion_logps", counted(calls := []))
    changes = [f"data.train=[{{path: {lists}}}]", "data.eval=[]", "training.eval_every=null"]
    found = world.references("objective={name: plackett_luce, max_completions: 4}", *changes)
    assert (sum(calls), found.computed, found.reused) == (TRAIN // 2, TRAIN, 0)
    assert found.train is not None
    assert found.train.shape == (TRAIN // 2, 1, 4)
