"""The command line: help without delay, one paragraph for a mistake, the right exit code, the right call."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import jaxpo
from jaxpo import launch
from jaxpo.config import Run
from jaxpo.errors import UserError
from jaxpo.processes import Place

CONFIG = "model: {path: m}\ndata: {train: [{path: d}]}\noutput_dir: out\n"
TINY = """\
model:
  scratch:
    architecture: {model_type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1}
    tokenizer: {vocab_size: 300}
data: {train: [{path: rows.jsonl}], cache_dir: cache, workers: 1}
training: {batch_size: 1}
output_dir: out
"""
COMMANDS = [
    "advise",
    "train",
    "reference",
    "data",
    "plan",
    "score",
    "convert",
    "convert from-hf",
    "convert to-hf",
    "schema",
]


class Calls:
    """Stands in for `jaxpo.run` and `jaxpo.conversion` and keeps what it was asked to do."""

    def __init__(self, failure: BaseException | None = None):
        self.made: list[tuple[Any, ...]] = []
        self.failure = failure

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            self.made.append((name, *arguments))
            if self.failure is not None:
                raise self.failure

        return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with config.yaml in it; the environment is put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return replace_run(monkeypatch, Calls())


def replace_run(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Calls:
    module = SimpleNamespace(
        train=calls.train,
        fill_reference=calls.fill_reference,
        inspect_data=calls.inspect_data,
    )
    conversion = SimpleNamespace(from_hf=calls.from_hf, to_hf=calls.to_hf)
    monkeypatch.setitem(sys.modules, "jaxpo.conversion", conversion)
    monkeypatch.setattr(jaxpo, "conversion", conversion, raising=False)
    monkeypatch.setitem(sys.modules, "jaxpo.run", module)
    monkeypatch.setattr(jaxpo, "run", module, raising=False)
    return calls


def python(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder)


def test_train_and_reference_get_the_config_with_its_overrides(folder: Path, calls: Calls):
    assert launch.main(["train", "config.yaml", "training.seed=3", "output_dir=elsewhere"]) == 0
    place = ["--coordinator", "host:1", "--processes", "2", "--process", "1"]
    assert launch.main(["reference", "config.yaml", *place]) == 0
    assert launch.main(["train", "config.yaml", "--resume", "runs/other"]) == 0
    (train, trained, alone, resume), (reference, referred, among), (*_, from_another) = calls.made
    assert (alone, among) == (None, Place("host:1", 2, 1))
    assert (resume, from_another) == ("auto", "runs/other")
    assert (train, reference) == ("train", "fill_reference")
    assert isinstance(trained, Run)
    assert (trained.training.seed, trained.output_dir) == (3, Path("elsewhere"))
    assert (referred.training.seed, referred.output_dir) == (0, Path("out"))


def test_data_takes_options_anywhere_among_the_overrides(folder: Path, calls: Calls):
    assert launch.main(["data", "config.yaml"]) == 0
    assert (
        launch.main(
            [
                "data",
                "config.yaml",
                "data.shuffle=false",
                "--split",
                "eval",
                "--stage",
                "sft",
                "--examples=5",
                "mesh.data=2",
            ]
        )
        == 0
    )
    (_, plain, *rest), (_, changed, *changed_rest) = calls.made
    assert (plain.data.shuffle, rest) == (True, [None, "train", 3])
    assert (changed.data.shuffle, changed.mesh.data, changed_rest) == (False, 2, ["sft", "eval", 5])


def test_convert_in_both_directions(folder: Path, calls: Calls):
    assert launch.main(["convert", "from-hf", "org/model", "here"]) == 0
    assert launch.main(["convert", "to-hf", "runs/x", "there", "--dtype", "bfloat16"]) == 0
    assert launch.main(["convert", "to-hf", "runs/x", "there"]) == 0
    assert calls.made == [
        ("from_hf", "org/model", Path("here")),
        ("to_hf", Path("runs/x"), Path("there"), "bfloat16"),
        ("to_hf", Path("runs/x"), Path("there"), None),
    ]


def test_schema_is_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert launch.main(["schema"]) == 0
    assert "training" in json.loads(capsys.readouterr().out)["$defs"]["Run"]["properties"]


def test_a_mistake_is_one_paragraph_and_exit_code_2(folder: Path, calls: Calls, capsys: pytest.CaptureFixture[str]):
    assert launch.main(["train", "config.yaml", "training.batchsize=3"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: override training.batchsize=3: training.batchsize is unknown; did you mean training.batch_size?\n"
    )
    assert calls.made == []


def test_a_mistake_found_while_running_is_told_the_same_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    replace_run(monkeypatch, Calls(UserError("pairs.jsonl:3: no answer,\n   expected one.")))
    assert launch.main(["train", "config.yaml"]) == 2
    assert capsys.readouterr().err == "error: pairs.jsonl:3: no answer, expected one.\n"


def test_a_terminal_gets_the_paragraph_at_its_width(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("COLUMNS", "40")
    text = launch._paragraph("error: " + "a word and another " * 8 + "a/path/that/is/longer/than/a/line/" * 2)
    *lines, last = text.splitlines()
    assert len(lines) > 3
    assert all(len(line) <= 40 for line in lines)
    assert last == "a/path/that/is/longer/than/a/line/" * 2


def test_an_interruption_is_one_line_and_exit_code_130(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    replace_run(monkeypatch, Calls(KeyboardInterrupt()))
    assert launch.main(["train", "config.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from the last checkpoint\n"
    assert launch.main(["data", "config.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_other_failures_are_defects_and_keep_their_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for failure in (ValueError("a defect"), SystemExit(143)):
        replace_run(monkeypatch, Calls(failure))
        with pytest.raises(type(failure)):
            launch.main(["train", "config.yaml"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "commands:"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: CONFIG\n"),
        (
            ["train", "c.yaml", "--training.seed=1"],
            "--training.seed=1 (an override is written KEY=VALUE, without dashes)",
        ),
        (["train", "c.yaml", "--fast"], "unrecognized arguments: --fast\n"),
        (["schema", "a.b=1"], "unrecognized arguments: a.b=1"),
        (["data", "c.yaml", "--examples", "-1"], "'-1' is no number of examples"),
        (["data", "c.yaml", "--examples", "few"], "'few' is no number of examples"),
        (["data", "c.yaml", "--split", "test"], "invalid choice: 'test'"),
        (["plan", "c.yaml", "--tokens-per-example", "120"], "'120' is not P,C[,C]: tokens of a prompt and of its"),
        (["plan", "c.yaml", "--tokens-per-example", "120,0"], "'120,0' is not P,C[,C]"),
        (["convert"], "required: DIRECTION"),
        (["convert", "to-hf", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_usage_ends_with_exit_code_2(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = launch.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_examples_and_fits_a_narrow_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        launch.main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m jaxpo.launch {command}".rstrip() in text
    assert "examples:" in text
    # An example is to be copied whole, and so may be long.
    assert all(len(line) <= 80 for line in text.splitlines() if "python -m jaxpo.launch" not in line)


def test_the_help_of_the_program_lists_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        launch.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for command in {command.split()[0] for command in COMMANDS}:
        assert any(line.startswith(f"  {command} ") for line in lines)


HELP = """
import sys
from jaxpo import launch
try:
    launch.main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"jax", "numpy", "pydantic", "transformers", "datasets", "rich", "yaml", "pathlib"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["trian"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str], tmp_path: Path):
    bare = python("import sys; print(sorted({'pathlib'} & set(sys.modules)), file=sys.stderr)", folder=tmp_path)
    assert python(HELP, *arguments, folder=tmp_path).stderr.splitlines()[-1] == bare.stderr.strip()


def test_help_takes_a_few_milliseconds_more_than_starting_python(tmp_path: Path):
    def seconds(code: str) -> float:
        """Processor time of the quickest of five, which other work on the machine disturbs least."""
        times = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert python(code, "--help", folder=tmp_path).returncode == 0
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(times)

    assert seconds(HELP) - seconds("pass") < 0.06


def test_libraries_are_quiet_and_compilations_kept_unless_the_user_says_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, calls: Calls
):
    for name in ("JAX_COMPILATION_CACHE_DIR", "TF_CPP_MIN_LOG_LEVEL"):
        os.environ.pop(name, None)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["HOME"] = "/home/someone"
    launch.main(["train", "config.yaml"])
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/home/someone/.cache/jaxpo/xla"
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "2"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_a_wrong_config_ends_the_real_program_without_a_traceback(folder: Path):
    command = [sys.executable, "-m", "jaxpo.launch", "train", "config.yaml", "training.seed=x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == 'error: override training.seed=x: training.seed is "x"; expected an integer >= 0 and <= 4294967295.\n'
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", ["advise --pairs", "schema", "data config.yaml"])
def test_a_full_disk_is_told_in_a_line(command: str, folder: Path):
    (folder / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (folder / "config.yaml").write_text(TINY)
    with Path("/dev/full").open("w") as full:
        line = [sys.executable, "-m", "jaxpo.launch", *command.split()]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, cwd=folder)
    assert done.stderr == "error: the output cannot be written: No space left on device.\n"
    assert done.returncode == 2


def test_another_error_of_the_system_is_a_defect(folder: Path, monkeypatch: pytest.MonkeyPatch):
    replace_run(monkeypatch, Calls(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        launch.main(["train", "config.yaml"])


def test_a_reader_that_stops_early_is_no_error(folder: Path):
    command = f"{sys.executable} -m jaxpo.launch schema | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stderr) == (141, "")
