"""Bad run folders, caches, reference tables and conversions; and the real program, as a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tensorstore as ts
from bench import CONFIG, Case, check_paragraph
from filelock import FileLock

from jaxpo import launch

TO_HF = ("convert", "to-hf")
FROM_HF = ("convert", "from-hf")


def folder_with(name: str, content: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return make


def another_run(folder: Path) -> None:
    """A run that has saved a step, with another config."""
    folder_with("run/config.yaml", CONFIG.replace("{name: dpo}", "{name: ipo}"))(folder)
    folder_with("run/checkpoints/3/state/x", "")(folder)


def run_without_steps(folder: Path) -> None:
    folder_with("run/config.yaml", CONFIG)(folder)
    (folder / "run/checkpoints").mkdir()


def native(folder: Path) -> None:
    assert launch.main([*FROM_HF, "llama", "native"]) == 0


def damaged_native(folder: Path) -> None:
    native(folder)
    for file in (folder / "native/weights").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-500])


def flipped_native(folder: Path) -> None:
    """One byte of the embedding changed, which TensorStore does not see.

    Its own bytes are looked for: a file of Orbax's also holds lists of arrays that a later one has taken the place of.
    """
    native(folder)
    weights = folder / "native/weights"
    database = {"driver": "ocdbt", "base": f"file://{weights}/"}
    chunk = ts.KvStore.open(database).result().read("embedding/0.0").result().value
    (file, content) = next((f, c) for f in weights.rglob("*") if f.is_file() and chunk in (c := f.read_bytes()))
    flipped(file, content.index(chunk) + len(chunk) // 2)


def stages(folder: Path) -> None:
    sft = (
        "stages:\n  sft:\n    model: {path: llama}\n    data: {train: [{path: answers.jsonl}], max_length: 128}\n"
        "    objective: {name: sft}\n"
    )
    (folder / "config.yaml").write_text(sft + CONFIG.replace("path: llama", 'path: "stage:sft"'))


FOLDERS = [
    Case("output_dir a file", ("output_dir run cannot be used",), change=folder_with("run", "")),
    Case("output_dir below a file", ("output_dir pairs.jsonl/run cannot be used",), ("output_dir=pairs.jsonl/run",)),
    Case(
        "output_dir of someone else",
        ("output_dir run holds thesis.tex but no config.yaml", "new or empty folder"),
        change=folder_with("run/thesis.tex", ""),
    ),
    Case(
        "output_dir of someone else, with a stage to do first",
        ("output_dir run holds thesis.tex but no config.yaml",),
        change=lambda f: (stages(f), folder_with("run/thesis.tex", "")(f)),
    ),
    Case(
        "output_dir of another run",
        ("output_dir run holds a run with another config: objective.name was 'ipo' and is 'dpo'", "another output_dir"),
        change=another_run,
        mended=("output_dir=run2",),
    ),
    Case(
        "output_dir where the config itself is",
        ("output_dir . holds a config.yaml that no run of jaxpo wrote", "new or empty folder"),
        ("output_dir=.",),
    ),
    Case(
        "output_dir of a broken config",
        ("run/config.yaml:1: not valid YAML",),
        change=folder_with("run/config.yaml", "model: ["),
    ),
    Case(
        "samples damaged",
        ("run/samples.json is damaged", "Expected a JSON object"),
        ("samples={prompts: 1, max_new_tokens: 1}",),
        change=lambda f: (
            launch.main(["train", "config.yaml", "data.train.0.path=gone.jsonl"]),
            folder_with("run/samples.json", "{")(f),
        ),
    ),
    Case(
        "stage not trained yet",
        ("stage:sft is not trained yet", "run/stages/sft/export does not exist"),
        change=stages,
        command=("reference", "config.yaml"),
    ),
    Case("data cache a file", ("data.cache_dir pairs.jsonl cannot be used",), ("data.cache_dir=pairs.jsonl",)),
    Case(
        "data cache below a file",
        ("data.cache_dir pairs.jsonl/cache cannot be used",),
        ("data.cache_dir=pairs.jsonl/cache",),
    ),
    Case("reference cache a file", ("reference.cache_dir", "pairs.jsonl"), ("reference.cache_dir=pairs.jsonl",)),
]

CONVERSIONS = [
    Case("conversion of nothing", ("nothing is neither a run", "nor a checkpoint"), command=(*TO_HF, "nothing", "out")),
    Case("conversion of data", ("pairs.jsonl is neither a run",), command=(*TO_HF, "pairs.jsonl", "out")),
    Case(
        "conversion of a Hugging Face folder to itself", ("llama is neither a run",), command=(*TO_HF, "llama", "out")
    ),
    Case(
        "conversion of a run without checkpoints",
        ("run is a run that has saved no checkpoint yet",),
        command=(*TO_HF, "run", "out"),
        change=folder_with("run/config.yaml", CONFIG),
    ),
    Case(
        "conversion of a run with an empty folder of checkpoints",
        ("run is a run that has saved no checkpoint yet",),
        command=(*TO_HF, "run", "out"),
        change=run_without_steps,
    ),
    Case(
        "conversion of a damaged checkpoint",
        ("run/checkpoints/3 cannot be read",),
        command=(*TO_HF, "run", "out"),
        change=another_run,
    ),
    Case(
        "conversion of a checkpoint without a run",
        ("lost/config.yaml does not exist",),
        command=(*TO_HF, "lost/checkpoints/3", "out"),
        change=folder_with("lost/checkpoints/3/state/x", ""),
    ),
    Case(
        "conversion onto other files",
        ("out holds files that no export of jaxpo wrote (thesis.tex)", "Nothing was changed"),
        command=(*TO_HF, "native", "out"),
        change=lambda f: (native(f), folder_with("out/thesis.tex", "")(f)),
    ),
    Case(
        "conversion onto a file",
        ("out is a file",),
        command=(*TO_HF, "native", "out"),
        change=lambda f: (native(f), folder_with("out", "")(f)),
    ),
    Case("conversion below a file", ("pairs.jsonl/out",), command=(*TO_HF, "native", "pairs.jsonl/out"), change=native),
    Case(
        "conversion of damaged weights",
        ("native/weights cannot be read", "convert from-hf"),
        command=(*TO_HF, "native", "out"),
        change=damaged_native,
    ),
    Case(
        "conversion of weights with a flipped byte",
        ("native/weights cannot be read", "changed since it was written"),
        command=(*TO_HF, "native", "out"),
        change=flipped_native,
    ),
    Case(
        "conversion to jaxpo's format twice",
        ("native is in jaxpo's own format already",),
        command=(*FROM_HF, "native", "out"),
        change=native,
    ),
    Case(
        "conversion to jaxpo's format onto files",
        ("native is there already; expected a new or empty folder",),
        command=(*FROM_HF, "llama", "native"),
        change=folder_with("native/thesis.tex", ""),
    ),
    Case(
        "conversion to jaxpo's format below a file",
        ("pairs.jsonl/native",),
        command=(*FROM_HF, "llama", "pairs.jsonl/native"),
    ),
    Case("conversion of a model of nobody", ("~nobody-here/llama",), command=(*FROM_HF, "~nobody-here/llama", "out")),
    Case("conversion to the home of nobody", ("~nobody-here/out",), command=(*FROM_HF, "llama", "~nobody-here/out")),
]

CASES = FOLDERS + CONVERSIONS


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_runs(case: Case, refused: Callable[[Case], None], bench: Path):
    refused(case)
    assert not list(bench.glob(".*new-*")), "a half-made folder was left behind"


def test_an_output_dir_of_someone_else_is_left_alone(refused: Callable[[Case], None], bench: Path):
    refused(next(case for case in FOLDERS if case.name == "output_dir of someone else, with a stage to do first"))
    assert not (bench / "run/stages").exists()


def test_an_output_dir_in_use(refused: Callable[[Case], None], bench: Path):
    (bench / "run").mkdir()
    with FileLock(bench / "run/.lock"):
        refused(Case("in use", ("output_dir run is in use by another jaxpo process",)))


@pytest.fixture
def table(bench: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    """The reference table of the good rows."""
    assert launch.main(["reference", "config.yaml"]) == 0
    capsys.readouterr()
    (folder,) = {
        key.parent for key in (bench / "cache/reference").glob("*/key.json") if '"num_rows": 8' in key.read_text()
    }
    yield folder


def flipped(file: Path, place: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        (
            lambda t: flipped(t / "logps/c.0.0"),
            ("logps/c.0.0", "rows 0 to 7 (pairs.jsonl:1 to pairs.jsonl:8)", "Delete"),
        ),
        (lambda t: (t / "logps/c.0.0").unlink(), ("logps/c.0.0", "rows 0 to 7", "is missing", "Delete")),
        (lambda t: (t / "logps/c.0.0").write_bytes(b""), ("logps/c.0.0", "rows 0 to 7", "Delete")),
        (lambda t: (t / "logps/zarr.json").write_text("{"), ("logps/zarr.json", "Delete")),
        (lambda t: (t / "key.json").unlink(), ("key.json is missing", "Delete")),
        (lambda t: (t / "key.json").write_text("[" * 100_000), ("key.json is not valid JSON", "Delete")),
        (lambda t: (t / "complete.json").write_text("[]"), ("complete.json does not belong to this table", "Delete")),
    ],
    ids=["flipped byte", "missing chunk", "empty chunk", "array cut", "key missing", "key nested", "completion wrong"],
)
def test_a_damaged_reference_table(
    change: Callable[[Path], object], tells: tuple[str, ...], table: Path, refused: Callable[[Case], None]
):
    change(table)
    refused(Case("damaged table", (table.name, *tells)))


def test_a_mistake_leaves_nothing_that_a_mended_run_trips_over(bench: Path, refused: Callable[[Case], None]):
    """One output_dir, mistake after mistake, and then the good config."""
    mistakes = [
        Case("data", ("gone.jsonl",), ("data.train.0.path=gone.jsonl",)),
        Case("model", ("bad has no config.json",), ("model.path=bad",), lambda folder: (folder / "bad").mkdir()),
        Case("metric", ("training.best_metric",), ("training.best_metric=eval_x", "training.best_mode=max")),
        Case("row length", ("training.row_length",), ("training.row_length=8", "data.max_length=100")),
    ]
    for case in mistakes:
        refused(case)
    assert launch.main(["train", "config.yaml"]) == 0
    summary = json.loads((bench / "run/summary.json").read_text())
    assert summary["steps"] == 1
    lines = [json.loads(line) for line in (bench / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]


@pytest.mark.parametrize("command", ["data", "train"])
def test_a_new_model_is_made_anew_when_its_description_changes(
    command: str, bench: Path, refused: Callable[[Case], None]
):
    def described(width: int) -> str:
        sizes = f"hidden_size: {width}, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2"
        return f"model={{scratch: {{architecture: {{model_type: llama, {sizes}}}, tokenizer: {{vocab_size: 300}}}}}}"

    # The first comes as far as its model, and no further where it trains.
    too_short = () if command == "data" else ("training.row_length=8",)
    launch.main([command, "config.yaml", described(16), *too_short])
    assert launch.main(["train", "config.yaml", described(32)]) == 0
    assert json.loads((bench / "run/export/config.json").read_text())["hidden_size"] == 32


REAL = [
    Case("data/line_cut_short", ("pairs.jsonl:2 is not JSON",)),
    Case("config/key_misspelt", ("did you mean training.batch_size?",)),
    Case("model.path=./lama", ("./lama does not exist",), ("model.path=./lama",)),
]


@pytest.mark.parametrize("case", REAL, ids=[case.name for case in REAL])
def test_the_real_program(case: Case, bench: Path, lay: Callable[[Case], None]):
    lay(case)
    command = [sys.executable, "-m", "jaxpo.launch", *case.arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bench)
    assert done.returncode == 2
    check_paragraph(case, done.stderr)
    assert not (bench / "run/checkpoints").exists()
