"""The configs: valid, explained, complete, and every one trains, on rows with the columns of its data on the hub."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest

from jaxpo import config_file
from jaxpo.config import Run
from jaxpo.config_checks import check
from jaxpo.data import formats
from jaxpo.data.files import Where
from jaxpo.data.readers import Preference
from jaxpo.data.record import Record
from jaxpo.objectives import AnyObjective

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "quickstart")
Row = dict[str, Any]

# What a header says, in this order.
PARTS = ("When", "Rows", "Expect", "Reference", "Memory", "Sources")
OBJECTIVES: tuple[type, ...] = get_args(get_args(AnyObjective)[0])
NAMES = {cls.__dataclass_fields__["name"].default for cls in OBJECTIVES}  # type: ignore[attr-defined]

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def header(path: Path) -> str:
    """The comment that a config begins with, without its signs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    top = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in top)


def example_rows(path: Path) -> Iterator[Row]:
    """The JSON rows in a header, each over one line or several."""
    _, _, text = header(path).partition("\nRows: ")
    shown = "\n".join(line for line in text.partition("\nExpect: ")[0].splitlines() if re.match(r"  +[{\"]| {3}", line))
    decoder = json.JSONDecoder()
    while (start := shown.find('{"')) >= 0:
        try:
            row, end = decoder.raw_decode(" ".join(shown[start:].split()))
        except ValueError:
            return
        yield row
        shown = " ".join(shown[start:].split())[end:]


@each_config
def test_a_header_says_all_that_one_needs_to_choose(path: Path):
    text = header(path)
    places = [text.index(f"\n{part}: ") for part in PARTS]
    assert places == sorted(places)
    assert f"\n  python -m jaxpo.launch train configs/{path.name}\n" in text
    assert re.search(r"arXiv \d{4}\.\d{5}|alignment-handbook|TRL", text[places[-1] :])
    assert all(len(line) <= 118 for line in text.splitlines())


@each_config
def test_the_run_is_named_after_its_config_and_makes_sense(path: Path):
    run = config_file.load(path)
    assert check(run) == []
    assert run.output_dir == Path("runs") / path.stem
    assert ("none:" in header(path).partition("\nReference: ")[2][:6]) == (not run.objective.uses_reference)


@each_config
def test_the_example_rows_are_rows_that_the_objective_can_use(path: Path):
    objective = config_file.load(path).objective
    rows = list(example_rows(path))
    assert rows
    for row in rows:
        record = Record(Where(f"{path.name}:row ", 1), row)
        reading = formats.detect(record, "auto", objective.feedback, objective.num_completions)
        found = formats.parse(record, reading, objective.num_completions)
        assert all(isinstance(one, Preference) for one in found)


# Overrides that stand in a comment or in the README.
OVERRIDE = re.compile(r"(?<![\w.])([a-z_][\w.]*=(?:'[^']*'|[\w./-]*\w))")


def offered(path: Path) -> list[str]:
    """The overrides in a config's comments, but for what a program in them says."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    text = "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))
    found = OVERRIDE.findall(re.sub(r"<<'END'\n.*\n +END\n", "", text, flags=re.DOTALL))
    return [" ".join(override.replace("'", "").split()) for override in found]


@each_config
def test_what_a_comment_offers_besides_is_a_config_too(path: Path):
    for override in offered(path):
        assert check(config_file.load(path, [override])) == [], override


def test_overrides_in_comments_are_found():
    found = {path.stem: offered(path) for path in CONFIGS}
    assert found["dpo-smollm2-hh"][:2] == ["data.train.0.limit=200", "training.batch_size=8"]
    assert found["dpo-norm-qwen2.5-ultrafeedback"] == ["objective={name: dpo, modifiers: [{name: ld, alpha: 0.5}]}"]
    assert found["plackett-luce-qwen2.5-ultrafeedback"] == []


def table() -> Iterator[tuple[str, str]]:
    """The objectives in the README's table, and what their rows say of where to start."""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| ((?:`\w+`(?:, )?)+)[^|]*\|.*\|([^|]*)\|$", line):
            yield from ((name, match[2]) for name in re.findall(r"`(\w+)`", match[1]))


def test_every_objective_stands_in_the_readme_with_a_config_to_start_from():
    rows = dict(table())
    assert set(rows) == NAMES
    assert f"{len(NAMES)} objectives on one code path" in (ROOT / "README.md").read_text(encoding="utf-8")
    for name, start in rows.items():
        [config] = re.findall(r"\(configs/([\w.-]+\.yaml)\)", start)
        overrides = [" ".join(found.replace("'", "").split()) for found in OVERRIDE.findall(start)]
        run = config_file.load(ROOT / "configs" / config, overrides)
        assert check(run) == []
        assert run.objective.name == name


def test_every_config_is_the_start_of_some_objective_or_named_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in CONFIGS if path.name not in text] == []


# Rows with the columns of the data sets that the configs name.


def turns(row: Row, column: str) -> list[Row]:
    return [*row["prompt"], *row[column]]


def said(messages: list[Row]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in messages)


def ultrafeedback(rows: list[Row]) -> list[Row]:
    return [
        {
            "prompt": row["prompt"][0]["content"],
            "prompt_id": str(n),
            "chosen": turns(row, "chosen"),
            "rejected": turns(row, "rejected"),
            "messages": turns(row, "chosen"),
            "score_chosen": 7.5,
            "score_rejected": 6.0,
        }
        for n, row in enumerate(rows)
    ]


def hh_rlhf(rows: list[Row]) -> list[Row]:
    return [{name: said(turns(row, name)) for name in ("chosen", "rejected")} for row in rows]


def kto_mix(rows: list[Row]) -> list[Row]:
    answers = [(row, name) for row in rows for name in ("chosen", "rejected")]
    return [{"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"} for row, name in answers]


def helpsteer3(rows: list[Row]) -> list[Row]:
    return [
        {
            "domain": "general",
            "language": "english",
            "context": row["prompt"],
            "response1": row["rejected"][0]["content"],
            "response2": row["chosen"][0]["content"],
            "overall_preference": 2,
            "individual_preference": [{"score": 2, "reasoning": "politer", "feedback1": "", "feedback2": ""}],
        }
        for row in rows
    ]


def smoltalk(rows: list[Row]) -> list[Row]:
    return [{"messages": turns(row, "chosen"), "source": "smol-magpie-ultra"} for row in rows]


def code_ultrafeedback(rows: list[Row]) -> list[Row]:
    texts = [{"instruction": row["prompt"][0]["content"]} for row in rows]
    answers = ("chosen", "rejected")
    return [{**t, **{name: row[name][0]["content"] for name in answers}} for t, row in zip(texts, rows, strict=True)]


def ultrafeedback_lists(rows: list[Row]) -> list[Row]:
    """As the program in the header of the configs makes them."""
    return [
        {
            "prompt": row["prompt"][0]["content"],
            "completions": [row["rejected"], other["chosen"], row["chosen"], other["rejected"]],
            "scores": [1.5, 3.25, 4.5, 1.25],
        }
        for row, other in pairwise([*rows, rows[0]])
    ]


LIKE: dict[str, Callable[[list[Row]], list[Row]]] = {
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback,
    "Anthropic/hh-rlhf": hh_rlhf,
    "trl-lib/kto-mix-14k": kto_mix,
    "nvidia/HelpSteer3": helpsteer3,
    "HuggingFaceTB/smol-smoltalk": smoltalk,
    "coseal/CodeUltraFeedback_binarized": code_ultrafeedback,
    "ultrafeedback-lists-train.jsonl": ultrafeedback_lists,
    "ultrafeedback-lists-test.jsonl": ultrafeedback_lists,
    "jaxpo:customer-service": lambda rows: rows,
}


def read(path: Path, limit: int) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small(path: Path, tiny: Path, out: Path) -> Run:
    """A config with the tiny model, rows like its own and two steps, in which its control acts; its own objective."""
    run = config_file.load(path)
    [train], [held_out] = run.data.train, run.data.eval
    out.mkdir(parents=True)
    sources = {
        "train": write(out / "train.jsonl", LIKE[train.path](read(tiny / "dpo.jsonl", 8))),
        "eval": write(out / "eval.jsonl", LIKE[held_out.path](read(tiny / "dpo-eval.jsonl", 4))),
    }
    sync = [] if run.reference.sync_steps is None else ["reference.sync_steps=1"]
    stop = [] if run.control.early_stop is None else ["control.early_stop.patience=1"]
    return config_file.load(
        path,
        [
            f"output_dir={out / 'run'}",
            f"model={{path: {tiny / 'llama'}, compute_dtype: float32, remat: none}}",
            *(f"data.{split}=[{{path: {rows}}}]" for split, rows in sources.items()),
            f"data.cache_dir={tiny / 'data'}",
            "data.workers=1",
            "data.max_length=96",
            "data.max_prompt_length=48",
            f"reference.cache_dir={tiny / 'reference'}",
            *sync,
            *stop,
            "training.batch_size=4",
            "training.row_length=512",
            "training.num_epochs=1",
            "training.max_steps=2",
            "training.eval_every=1",
            "training.save_every=null",
            "optimizer.learning_rate=1.0e-2",
            "logging.every=1",
            "samples.prompts=0",
        ],
    )


def train_all(tiny: Path, out: Path) -> None:
    """Train every config, in this process, and print a line of JSON with the first and the last evaluation of each."""
    from jaxpo import run
    from jaxpo.evaluation import plots

    plots.write = lambda records, folder: []
    for path in CONFIGS:
        folder = run.train(small(path, tiny, out / path.stem))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        print("TRAINED", json.dumps([path.stem, summary["before"], summary["after"]]), flush=True)


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Row, Row]]:
    """Held-out metrics of every config before and after two steps.

    On one device, in a process of its own, and without the optimisations that make programs faster than they are built.
    """
    quick = {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(Path("~/.cache/jaxpo/xla-tests").expanduser())}
    done = subprocess.run(
        [sys.executable, __file__, tiny, tmp_path_factory.mktemp("configs")],
        env={**os.environ, **quick, **cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("TRAINED ")]
    return {name: (before, after) for name, before, after in lines}


@each_config
def test_a_config_trains_and_the_held_out_loss_falls(path: Path, trained: dict[str, tuple[Row, Row]]):
    before, after = trained[path.stem]
    assert all(math.isfinite(value) for value in (before | after).values() if value is not None)
    assert after["eval_loss"] < before["eval_loss"]


# What the headers say that a loss begins at, less the terms that depend on the model.
BEGINS = {
    **dict.fromkeys(
        [
            "all-pairs-qwen2.5-ultrafeedback",
            "bco-qwen2.5-kto-mix",
            "cdpo-smollm2-hh",
            "dpo-norm-qwen2.5-ultrafeedback",
            "dpo-qwen2.5-code",
            "dpo-qwen2.5-customer-service",
            "dpo-smollm2-hh",
            "dpo-soft-qwen2.5-ultrafeedback",
            "tr-dpo-qwen2.5-ultrafeedback",
        ],
        0.693,
    ),
    "apo-zero-qwen2.5-ultrafeedback": 1.0,
    "apo-zero-unpaired-qwen2.5-kto-mix": 0.5,
    "ipo-qwen2.5-ultrafeedback": 25.0,
    "kto-qwen2.5-kto-mix": 0.5,
    "plackett-luce-qwen2.5-ultrafeedback": 3.178,
    "mpo-qwen2.5-ultrafeedback": 0.832,
    "rpo-qwen2.5-ultrafeedback": 0.693,
}


@pytest.mark.parametrize("name", BEGINS)
def test_a_loss_begins_where_the_header_says(name: str, trained: dict[str, tuple[Row, Row]]):
    before, _ = trained[name]
    likelihood = before.get("eval_loss/sft", before.get("eval_nll_loss", 0.0))
    assert before["eval_loss"] - likelihood == pytest.approx(BEGINS[name], abs=6e-4)
    expected = header(ROOT / "configs" / f"{name}.yaml").partition("\nExpect: ")[2].partition("\nReference: ")[0]
    assert f"{BEGINS[name]:g}" in expected or "ln 2" in expected


@pytest.mark.parametrize("name", ["plackett-luce-qwen2.5-ultrafeedback", "all-pairs-qwen2.5-ultrafeedback"])
def test_the_program_in_a_header_makes_the_lists(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    answers = [{"response": f"answer {k}", "fine-grained_score": k / 4, "model": "a model"} for k in range(4)]
    rows = [{"instruction": f"question {n}", "source": "sharegpt", "completions": answers} for n in range(1200)]
    hub = datasets.Dataset.from_list([*rows, {**rows[0], "completions": answers[:1]}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: {"openbmb/UltraFeedback": hub}[path])
    monkeypatch.chdir(tmp_path)
    program = header(ROOT / "configs" / f"{name}.yaml").partition("<<'END'\n")[2].partition("\n  END")[0]
    exec("\n".join(line.removeprefix("  ") for line in program.splitlines()), {})
    run = config_file.load(ROOT / "configs" / f"{name}.yaml")
    made = {source.path: read(tmp_path / source.path, 2000) for source in (*run.data.train, *run.data.eval)}
    assert [len(found) for found in made.values()] == [200, 1000]
    [row, *_] = made["ultrafeedback-lists-train.jsonl"]
    assert set(row) == {"prompt", "completions", "scores"}
    reading = formats.detect(Record(Where("row ", 1), row), "auto", "ranking", 4)
    [preference] = formats.parse(Record(Where("row ", 1), row), reading, 4)
    assert isinstance(preference, Preference)
    assert preference.scores == (0.75, 0.5, 0.25, 0.0)


if __name__ == "__main__":
    train_all(Path(sys.argv[1]), Path(sys.argv[2]))
