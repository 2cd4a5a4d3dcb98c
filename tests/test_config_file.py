"""YAML to `Run` and back: what is read, and what every mistake is told as."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import CASES, MEMBERS
from pydantic import TypeAdapter

from jaxpo import config_file
from jaxpo.config import DataConfig, DataSource, ModelConfig, Run, Scratch, WandbConfig
from jaxpo.config_checks import check
from jaxpo.errors import UserError
from jaxpo.objectives import IPO
from jaxpo.objectives.mixture import Mixture
from jaxpo.objectives.ranked import AllPairs
from jaxpo.objectives.reference_free import SimPO

VALIDATOR = jsonschema.Draft202012Validator(config_file.schema())

GOOD = """\
model: {path: org/model, dtype: float32}
data:
  train: [{path: org/pairs, split: train}]
  eval:
    - {path: org/pairs, split: test}
  max_length: 512
objective: {name: dpo, beta: 0.1}
training: {batch_size: 64, max_steps: null}
optimizer: {learning_rate: 5e-7, betas: [0.9, 0.95]}
output_dir: runs/x
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good config, `x.yaml` in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("x.yaml")
    path.write_text(GOOD)
    return path


def load(file: Path, text: str, *overrides: str) -> Run:
    file.write_text(text)
    return config_file.load(file, overrides)


def message(file: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(file, text, *overrides)
    told = str(caught.value)
    assert "\n" not in told
    return told


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_a_config_is_read_as_it_says(file: Path):
    run = load(file, GOOD)
    assert run.model == ModelConfig(path="org/model")
    assert run.data.eval == (DataSource(path="org/pairs", split="test"),)
    assert run.optimizer.learning_rate == 5e-7
    assert run.optimizer.betas == (0.9, 0.95)
    assert run.training.max_steps is None
    assert run.output_dir == Path("runs/x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("2", 2.0),
        ("+1.5e+2", 150.0),
        ("0x10", 16),
        ("010", 10),
    ],
)
def test_numbers_are_those_of_yaml_1_2(file: Path, text: str, value: float):
    assert load(file, changed("5e-7", text)).optimizer.learning_rate == value


def test_text_that_yaml_1_1_takes_for_something_else_stays_text(file: Path):
    for text in ("on", "yes", "No", "12:30:00", "2024-01-02", "1_000"):
        assert load(file, changed("org/model", text)).model.path == text


def test_overrides_take_the_place_of_values(file: Path):
    run = load(
        file,
        GOOD,
        "training.batch_size=8",
        "optimizer.learning_rate=1e-6",
        "data.train.0.path=a=b.jsonl",
        "data.train.1.path=more",
        "objective={name: ipo, normalize: false}",
        "training.eval_every=10",
        "training.eval_every=",
        "logging.wandb.project=p",
        "data.eval=[]",
        "output_dir=runs/y",
    )
    assert run.training.batch_size == 8
    assert run.training.eval_every is None
    assert run.optimizer.learning_rate == 1e-6
    assert [source.path for source in run.data.train] == ["a=b.jsonl", "more"]
    assert run.objective == IPO(normalize=False)
    assert run.logging.wandb == WandbConfig(project="p")
    assert run.data.eval == ()
    assert run.output_dir == Path("runs/y")


def test_overrides_reach_into_stages(file: Path):
    stage = "stages: {sft: {model: {path: m}, data: {train: [{path: d}]}, objective: {name: sft}}}\n"
    run = load(file, GOOD + stage, "stages.sft.training.max_steps=3", "model.path=stage:sft")
    assert run.stages["sft"].training.max_steps == 3
    assert run.training.max_steps is None


def test_anchors_and_merges_share_parts(file: Path):
    text = GOOD.replace("data:\n", "data: &data\n").replace("model: {", "model: &model {")
    run = load(file, text + "stages:\n  sft:\n    model: *model\n    data: {<<: *data, max_length: 64}\n")
    assert run.stages["sft"].data.max_length == 64
    assert run.stages["sft"].data.train == run.data.train
    told = message(file, text + "stages:\n  sft:\n    model: *model\n    data: {<<: *data, max_length: x}\n")
    assert told.startswith("x.yaml:14: stages.sft.data.max_length is ")


NAMES = f"one of {', '.join(sorted({objective.name for objective in CASES.values()}))}"
# Each: what is said, the override or the replacement that says it, and what the message must hold.
WRONG_VALUES = [
    ("batch_size: 64", "batch_size: many", 'x.yaml:8: training.batch_size is "many"; expected an integer > 0.'),
    ("batch_size: 64", "batch_size: 0", "x.yaml:8: training.batch_size is 0; expected an integer > 0."),
    ("batch_size: 64", "batch_size: 1e2", "training.batch_size is 100.0; expected an integer > 0 (written 100)."),
    ("batch_size: 64", "batch_size: true", "training.batch_size is true; expected an integer > 0."),
    ("batch_size: 64", "batch_size: null", "training.batch_size is null; expected an integer > 0."),
    ("batch_size: 64", "packing: on", 'training.packing is "on"; expected true or false (written true).'),
    ("batch_size: 64", "max_grad_norm: -1", "training.max_grad_norm is -1; expected a number > 0 or null."),
    ("max_length: 512", "max_length: .nan", "x.yaml:6: data.max_length is .nan; expected a number of a sensible size."),
    ("5e-7", "1e999", "optimizer.learning_rate is 1e999; expected a number of a sensible size."),
    ("5e-7", "9" * 30, "expected a number of a sensible size."),
    ("[0.9, 0.95]", "[0.9]", "optimizer.betas is the list [0.9]; expected a list of 2, each a number >= 0 and < 1."),
    ("[0.9, 0.95]", "[0.9, 0.95, 0.99]", "expected a list of 2, each a number >= 0 and < 1."),
    ("[0.9, 0.95]", "[0.9, 1.0]", "x.yaml:9: optimizer.betas.1 is 1.0; expected a number >= 0 and < 1."),
    ("dtype: float32", "dtype: float23", "expected one of float32, bfloat16 (did you mean float32?)."),
    (
        "org/model",
        "12e4",
        "model.path is 120000.0; expected text that is not empty or null (in quotes, if that is a name).",
    ),
    ("org/model", "''", 'model.path is ""; expected text that is not empty or null.'),
    ("runs/x", "[runs]", 'output_dir is the list ["runs"]; expected a path or null.'),
    (
        "[{path: org/pairs, split: train}]",
        "org/pairs",
        'x.yaml:3: data.train is "org/pairs"; expected a list, each item a ',
    ),
    (
        "[{path: org/pairs, split: train}]",
        "[org/pairs]",
        'x.yaml:3: data.train.0 is "org/pairs"; expected a mapping with ',
    ),
    ("{path: org/pairs, split: train}", "{split: train}", "x.yaml:3: data.train.0.path is missing; expected text"),
    (
        "{path: org/model, dtype: float32}",
        "org/model",
        'x.yaml:1: model is "org/model"; expected a mapping with keys such ',
    ),
    ("{name: dpo, beta: 0.1}", "dpo", f'x.yaml:7: objective is "dpo"; expected a mapping with a name, {NAMES}.'),
    ("name: dpo", "name: dop", f'x.yaml:7: objective.name is "dop"; expected {NAMES} (did you mean dpo?).'),
    ("name: dpo", "name: DPO", f'objective.name is "DPO"; expected {NAMES} (did you mean dpo?).'),
    ("name: dpo", "name: simppo", f'objective.name is "simppo"; expected {NAMES} (did you mean simpo?).'),
    ("name: dpo", "name: exo_pair", f'objective.name is "exo_pair"; expected {NAMES} (did you mean exo?).'),
    ("name: dpo, ", "", f"x.yaml:7: objective.name is missing; expected {NAMES}."),
    ("name: dpo", "name: null", f"x.yaml:7: objective.name is null; expected {NAMES}."),
    ("beta: 0.1", "beta: high", 'x.yaml:7: objective.beta is "high"; expected a number >= 1e-06 and <= 1000000.'),
]


@pytest.mark.parametrize(("old", "new", "expected"), WRONG_VALUES, ids=[new for _, new, _ in WRONG_VALUES])
def test_a_wrong_value_is_told_with_key_place_and_expectation(file: Path, old: str, new: str, expected: str):
    assert expected in message(file, changed(old, new))


UNKNOWN_KEYS = [
    ("batch_size: 64", "batchsize: 64", "x.yaml:8: training.batchsize is unknown; did you mean training.batch_size?"),
    ("batch_size: 64", "learning_rate: 1", "training.learning_rate is unknown; did you mean optimizer.learning_rate?"),
    ("batch_size: 64", "max_length: 1", "training.max_length is unknown; did you mean data.max_length?"),
    ("beta: 0.1", "betta: 0.1", "x.yaml:7: objective.betta is unknown; did you mean objective.beta?"),
    ("dpo, beta: 0.1", "ipo, normalise: true", "objective.normalise is unknown; did you mean objective.normalize?"),
    ("beta: 0.1", "normalise: true", "objective.normalise is unknown; expected one of beta, modifiers, divergence, "),
    ("split: test", "spilt: test", "x.yaml:5: data.eval.0.spilt is unknown; did you mean data.eval.0.split?"),
    ("output_dir: runs/x", "outputdir: runs/x", "x.yaml:10: outputdir is unknown; did you mean output_dir?"),
    ("output_dir: runs/x", "zzz: 1", "x.yaml:10: zzz is unknown; expected one of "),
    ("output_dir: runs/x", "on: 1", "x.yaml:10: on is unknown; expected one of "),
    # Of another section the same key is a suggestion, one that only looks like it is none.
    ("{name: dpo, beta: 0.1}", "{name: reward, beta: 0.1}", "objective.beta is unknown; expected one of name, "),
    ("batch_size: 64", "learning_rat: 1", "training.learning_rat is unknown; expected one of batch_size, "),
]


@pytest.mark.parametrize(("old", "new", "expected"), UNKNOWN_KEYS, ids=[new for _, new, _ in UNKNOWN_KEYS])
def test_an_unknown_key_is_told_with_the_nearest_valid_one(file: Path, old: str, new: str, expected: str):
    assert expected in message(file, changed(old, new))


def test_the_key_of_another_objective_is_unknown_to_this_one(file: Path):
    """And not what yet another objective's parts would call it."""
    told = message(file, changed("{name: dpo, beta: 0.1}", "{name: nca, label_smoothing: 0.1}"))
    assert told == "x.yaml:7: objective.label_smoothing is unknown; expected one of beta, modifiers, name."


def test_all_mistakes_are_told_in_one_paragraph_in_the_order_of_the_file(file: Path):
    text = changed("beta: 0.1", "betta: 1").replace("batch_size: 64", "batch_size: 0").replace("float32", "float16")
    told = message(file, text, "mesh.fdsp=2", "training.seed=x")
    places = ["x.yaml: 5 mistakes.", "(1) x.yaml:1: model.dtype", "(2) x.yaml:7: objective.betta"]
    places += [
        "(3) x.yaml:8: training.batch_size",
        "(4) override mesh.fdsp=2: mesh.fdsp is unknown; did you mean mesh.fsdp?",
    ]
    places += ['(5) override training.seed=x: training.seed is "x"; expected an integer >= 0 and <= 4294967295.']
    found = [told.find(place) for place in places]
    assert -1 not in found
    assert found == sorted(found)


MODIFIER_NAMES = "one of ld, nll, reference_free, score_labels, score_margin, wpo"
# Each: an objective, and what is said of it.
WRONG_OBJECTIVES = [
    (
        "{name: dpo, modifiers: [{name: wpoo}]}",
        f'objective.modifiers.0.name is "wpoo"; expected {MODIFIER_NAMES} (did you mean wpo?).',
    ),
    (
        "{name: dpo, modifiers: [wpo]}",
        f'objective.modifiers.0 is "wpo"; expected a mapping with a name, {MODIFIER_NAMES}.',
    ),
    (
        "{name: dpo, modifiers: {name: wpo}}",
        'objective.modifiers is the mapping {"name": "wpo"}; expected a list, each item a mapping with a name, '
        f"{MODIFIER_NAMES}.",
    ),
    ("{name: dpo, modifiers: [{alpha: 1}]}", f"objective.modifiers.0.name is missing; expected {MODIFIER_NAMES}."),
    (
        "{name: dpo, modifiers: [{name: ld, alpha: 2}]}",
        "objective.modifiers.0.alpha is 2; expected a number >= 0 and <= 1.",
    ),
    (
        "{name: dpo, modifiers: [{name: ld, aplha: 0.2}]}",
        "objective.modifiers.0.aplha is unknown; did you mean objective.modifiers.0.alpha?",
    ),
    (
        "{name: dpo, modifiers: [{name: wpo}, {name: wpo}]}",
        "objective.modifiers has wpo 2 times; expected each of them once.",
    ),
    (
        "{name: nca, modifiers: [{name: score_margin}]}",
        "objective.modifiers has score_margin, which asks for a margin between two rewards, but this loss is not one "
        "of their difference; expected an objective such as dpo, hinge, ipo or simpo.",
    ),
    (
        "{name: hinge, modifiers: [{name: score_labels}]}",
        "objective.modifiers has score_labels, but this loss has no soft labels; expected one such as dpo or ipo.",
    ),
    (
        "{name: aot, modifiers: [{name: wpo}]}",
        "objective.modifiers has wpo, which weighs each pair, but this loss is one of order statistics, which belong "
        "to no pair; leave it out.",
    ),
    (
        "{name: simpo, modifiers: [{name: reference_free}]}",
        "objective.modifiers has reference_free, but this objective uses no reference anyway; leave it out.",
    ),
    ("{name: exo, label_smoothing: 0}", "objective.label_smoothing is 0; expected a number > 0 and < 0.5."),
    ("{name: dpo, label_smoothing: 0.5}", "objective.label_smoothing is 0.5; expected a number >= 0 and < 0.5."),
    (
        "{name: dpo, divergence: js}",
        'objective.divergence is "js"; expected a mapping with a name, one of alpha, forward_kl, js, reverse_kl.',
    ),
    (
        "{name: dpo, divergence: {name: jss}}",
        'objective.divergence.name is "jss"; expected one of alpha, forward_kl, js, reverse_kl (did you mean js?).',
    ),
    ("{name: dpo, divergence: {name: js, alpha: 1}}", "objective.divergence.alpha is unknown; expected one of name."),
    ("{name: kto, modifiers: []}", "objective.modifiers is unknown; expected one of beta, name, desirable_weight, "),
    (
        "{name: all_pairs, pair: {name: orpo}}",
        "objective.pair is orpo, which imitates one chosen answer; a list has none of its own.",
    ),
    (
        "{name: all_pairs, pair: {name: aot}}",
        "objective.pair is aot, which couples the pairs of a batch; expected one that does not.",
    ),
    (
        "{name: all_pairs, pair: {name: dpo, modifiers: [{name: ld}]}}",
        "objective.pair.modifiers has ld, which does not apply to every pair of a list.",
    ),
    (
        "{name: all_pairs, pair: {name: nca, modifiers: [{name: score_margin}]}}",
        "objective.pair.modifiers has score_margin, which asks for a margin between two rewards",
    ),
    ("{name: all_pairs}", "objective.pair is missing; expected a mapping with a name, one of alphapo, aot, "),
    (
        "{name: all_pairs, pair: {name: dpo, max_completions: 3}}",
        "objective.pair.max_completions is unknown; did you mean objective.max_completions?",
    ),
    (
        "{name: plackett_luce, max_completions: 1}",
        "objective.max_completions is 1; expected an integer >= 2 and <= 64.",
    ),
    ("{name: reward, max_completions: 1}", "objective.max_completions is 1; expected an integer >= 2 and <= 64."),
    (
        "{name: mixture}",
        "objective.terms is missing; expected a list of at least 2, each item a mapping with keys such as weight, ",
    ),
    (
        "{name: mixture, terms: [{objective: {name: dpo}}]}",
        'objective.terms is the list [{"objective": {"name": "dpo"}}]; expected a list of at least 2, each item a ',
    ),
    (
        "{name: mixture, terms: [{objective: {name: dpo}}, {objective: {name: dpo}}]}",
        "objective.terms has dpo 2 times; expected each objective once.",
    ),
    (
        "{name: mixture, terms: [{objective: {name: dpo}}, {objective: {name: kto}}]}",
        'objective.terms.1.objective.name is "kto"; expected one of alphapo, aot, ',
    ),
    (
        "{name: mixture, terms: [{objective: {name: dpo}}, {objective: {name: ipo, betta: 1}}]}",
        "objective.terms.1.objective.betta is unknown; did you mean objective.terms.1.objective.beta?",
    ),
    (
        "{name: mixture, terms: [{objective: {name: dpo}, weight: 0}, {objective: {name: sft}}]}",
        "objective.terms.0.weight is 0; expected a number >= 1e-06 and <= 1000000.",
    ),
]


@pytest.mark.parametrize(("objective", "expected"), WRONG_OBJECTIVES, ids=[said for said, _ in WRONG_OBJECTIVES])
def test_a_mistake_in_an_objective_is_told_once_and_by_its_key(file: Path, objective: str, expected: str):
    told = message(file, changed("{name: dpo, beta: 0.1}", objective))
    assert told.startswith(f"x.yaml:7: {expected}")
    assert told.count(": objective.") == 1


def test_an_objective_where_a_term_belongs_is_told_what_to_write(file: Path):
    told = message(file, changed("{name: dpo, beta: 0.1}", "{name: mixture, terms: [{name: dpo}, {name: ipo}]}"))
    for i in (0, 1):
        assert f"objective.terms.{i}.objective is missing; expected a mapping with a name, one of alphapo" in told
        assert f"objective.terms.{i}.name is unknown; did you mean objective.terms.{i}.objective.name?" in told
    assert told.startswith("x.yaml: 4 mistakes.")


@pytest.mark.parametrize("case", CASES)
def test_every_objective_is_read_from_yaml_and_written_back(file: Path, case: str):
    """With all of its settings, which the schema of an editor takes too."""
    said = TypeAdapter(type(CASES[case])).dump_json(CASES[case]).decode()
    run = load(file, changed("{name: dpo, beta: 0.1}", said))
    assert run.objective == CASES[case]
    assert load(file, config_file.dump(run)) == run
    assert VALIDATOR.is_valid(config_file.as_mapping(run))


def test_an_objective_needs_its_name_alone(file: Path):
    """Every one, but those that are made of others."""
    for cls in MEMBERS:
        if cls not in (AllPairs, Mixture):
            assert load(file, changed("{name: dpo, beta: 0.1}", f"{{name: {cls().name}}}")).objective == cls()
    pair = load(file, changed("{name: dpo, beta: 0.1}", "{name: all_pairs, pair: {name: simpo}}")).objective
    assert pair == AllPairs(pair=SimPO())


BAD_OVERRIDES = [
    ("training.batch_size", "override training.batch_size: expected KEY=VALUE"),
    ("=3", "override =3: expected KEY=VALUE"),
    ("training..seed=3", "expected KEY=VALUE"),
    ("trainig.batch_size=3", "override trainig.batch_size=3: trainig is unknown; did you mean training?"),
    ("training.batch_size=-3", "override training.batch_size=-3: training.batch_size is -3; expected an integer > 0."),
    ("model.path.x=3", 'override model.path.x=3: model.path is "org/model", which has no x.'),
    ("data.train.7.path=x", "data.train is the list "),
    ("data.train.path=x", "which has no path."),
    ("data.eval=[", "override data.eval=[: not valid YAML: "),
    ("model.path=x: y", 'model.path is the mapping {"x": "y"}; expected text'),
    ("model={path: a, path: b}", "override model={path: a, path: b}: model.path is there twice"),
    ("training.seed=\x00", "override training.seed=\x00: the character '\\x00' is not allowed in YAML."),
]


@pytest.mark.parametrize(("override", "expected"), BAD_OVERRIDES, ids=[repr(text) for text, _ in BAD_OVERRIDES])
def test_a_mistake_in_an_override_names_the_override(file: Path, override: str, expected: str):
    assert expected in message(file, GOOD, override)


BAD_FILES = [
    ("", "x.yaml is empty; expected a mapping of keys such as model, data and training."),
    ("# nothing\n", "x.yaml is empty"),
    ("- a\n", 'x.yaml holds the list ["a"]; expected a mapping'),
    ("just text", 'x.yaml holds "just text"; expected a mapping'),
    (GOOD + "training: {}\n", "x.yaml:11: training is there twice, in lines 8 and 11; expected it once."),
    (GOOD + "\tseed: 1\n", "x.yaml:11: not valid YAML: a tab where YAML allows spaces only."),
    (GOOD + "mesh: {data: 1\n", "not valid YAML: while parsing a flow mapping"),
    (GOOD + "mesh: *nowhere\n", "x.yaml:11: not valid YAML: found undefined alias"),
    (GOOD + "---\na: 1\n", "not valid YAML: expected a single document"),
    (GOOD + "1: 2\n", "x.yaml:11: 1 is no key; expected text, in quotes where it looks like a number."),
    (GOOD + "[a]: 2\n", "x.yaml:11: a collection is no key"),
    (GOOD + "mesh: !!python/object:os.system x\n", "x.yaml:11: mesh is "),
    (GOOD + "mesh: {data: !!int x}\n", "mesh.data is "),
    (GOOD + "name: \x08\n", "x.yaml:11: the character '\\x08' is not allowed in YAML."),
    (GOOD + 'name: "\\ud800"\n', "half of a surrogate pair"),
    ("model: " + "[" * 60 + "]" * 60, "model.0.0… is nested too deeply"),
    ("model: " + "[" * 5_000, "x.yaml is nested too deeply"),
    ("model: &a [*a]", "nested too deeply"),
    ("data: {}\nmodel: {}\n", "x.yaml: output_dir is missing; expected the folder to put the run into."),
    ("output_dir: x\n", "x.yaml: model is missing; expected a mapping with keys such as path, revision, scratch."),
]


@pytest.mark.parametrize(("text", "expected"), BAD_FILES, ids=[expected for _, expected in BAD_FILES])
def test_a_file_that_is_no_config_is_told_with_its_line(file: Path, text: str, expected: str):
    assert expected in message(file, text)


def test_files_that_cannot_be_read(file: Path):
    def told(name: str) -> str:
        with pytest.raises(UserError) as caught:
            config_file.load(Path(name), [])
        return str(caught.value)

    assert told("xx.yaml") == "xx.yaml does not exist; expected a YAML config. Did you mean x.yaml?"
    assert told("nowhere/at/all.yaml") == "nowhere/at/all.yaml does not exist; expected a YAML config."
    assert told(".") == ". is a folder; expected a YAML config."
    assert "cannot be read (Not a directory)" in told("x.yaml/y.yaml")
    file.write_bytes(b"model: {}\ndata: \xff\n")
    assert told("x.yaml") == "x.yaml:2: the byte 0xff is not UTF-8; expected a YAML config in UTF-8."
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert config_file.load(file).training.batch_size == 64


BETWEEN_KEYS = [
    (["model={}"], "model has neither path nor scratch; expected one of them"),
    (["model.scratch={architecture: {}}"], "model.scratch stands beside model.path; expected one of them"),
    (["model.path=stage:sft"], 'model.path is "stage:sft", which names no earlier stage; expected another model'),
    (["reference.path=stage:x"], 'reference.path is "stage:x", which names no earlier stage'),
    (
        ["model={scratch: {architecture: {}}, revision: main}"],
        "model.revision has no effect without a hub id in model.path",
    ),
    (["reference.revision=main"], "reference.revision has no effect without a hub id in reference.path"),
    (
        ["objective={name: sft}", "reference.path=m"],
        "reference.path has no effect: the objective sft uses no reference",
    ),
    (
        ["objective={name: simpo}", "reference.sync_steps=8"],
        "reference.sync_steps has no effect: the objective simpo uses no reference",
    ),
    (["reference.mixup_alpha=0.6"], "reference.mixup_alpha has no effect without reference.sync_steps"),
    (["output_dir=null"], "output_dir is missing"),
    (["data.train=[]"], "data.train is empty; expected a list of at least one source"),
    (["data.train=[{path: a, weight: 1}, {path: b}]"], "data.train.1.weight is missing where other sources have one"),
    (["data.eval=[{path: b}, {path: a, weight: 1}]"], "data.eval.1.weight has no effect"),
    (["training.best_mode=min"], "training.best_mode has no effect without training.best_metric"),
    (
        ["training.best_metric=eval_rewards/chosen"],
        'training.best_mode is missing, and the name "eval_rewards/chosen" does not say whether more or less of it is '
        "better; expected min or max",
    ),
    (
        ["training.best_metric=eval_nll_loss", "training.best_mode=max"],
        "training.best_mode is max, but less of eval_nll_loss is better; expected min, or the key left out",
    ),
    (["output_dir=~nobody-here/x"], 'output_dir is "~nobody-here/x", the home of a user whom'),
    (
        ["output_dir=gs://bucket/run"],
        'output_dir is "gs:/bucket/run", an address; expected a folder that every host sees',
    ),
    (["data.cache_dir=" + "x" * 256], "which is too long for the name of a file"),
    (["data.max_prompt_length=512"], "data.max_prompt_length is 512; expected less than data.max_length, 512"),
    (["data.eval=[]", "training.eval_every=5"], "training.eval_every is 5 but data.eval is empty"),
    (["training.best_metric=loss"], 'training.best_metric is "loss"; expected a metric of the evaluation'),
    (
        ["data.eval=[]", "training.best_metric=eval_loss"],
        "training.best_metric needs an evaluation but data.eval is empty",
    ),
    (["export.checkpoint=best"], "export.checkpoint is best but training.best_metric is not set"),
    (
        ["objective={name: sft}", "control.max_kl=5"],
        "control.max_kl needs a distance to a reference, but the objective sft uses none",
    ),
    (
        ["objective={name: orpo}", "control.adaptive_beta={kl_low: 1, kl_high: 2}"],
        "control.adaptive_beta needs a distance to a reference, but the objective orpo uses none",
    ),
    (
        ["control.adaptive_beta={kl_low: 2, kl_high: 2}"],
        "control.adaptive_beta.kl_low is 2; expected less than control.adaptive_beta.kl_high, 2",
    ),
    (
        ["control.early_stop={metric: loss}", "training.eval_every=5"],
        'control.early_stop.metric is "loss"; expected a metric of the evaluation',
    ),
    (
        ["control.early_stop={metric: eval_loss}", "data.eval=[]"],
        "control.early_stop needs evaluations but data.eval is empty",
    ),
    (
        ["control.early_stop={metric: eval_loss}"],
        "control.early_stop needs evaluations on the way, but training.eval_every is not set",
    ),
    (
        ["control.early_stop={metric: eval_confidence}", "training.eval_every=5"],
        'control.early_stop.mode is missing, and the name "eval_confidence" does not say',
    ),
    (
        ["control.early_stop={metric: eval_rewards/margins, mode: min}", "training.eval_every=5"],
        "control.early_stop.mode is min, but more of eval_rewards/margins is better; expected max",
    ),
    (["training.max_steps=5", "optimizer.warmup_steps=5"], "optimizer.warmup_steps is 5; expected less than "),
    (
        ["training.max_steps=5", "reference.sync_steps=5"],
        "reference.sync_steps is 5; expected less than training.max_steps, 5: the reference would never move",
    ),
    (
        ["training.max_steps=10", "control.max_kl=5"],
        "control.max_kl is looked at every 10 steps (logging.every); expected less than training.max_steps, 10: it "
        "would never end the run",
    ),
    (
        ["training.max_steps=6", "training.eval_every=3", "control.early_stop={metric: eval_loss, patience: 2}"],
        "control.early_stop ends no run before step 6, patience * training.eval_every; expected less than "
        "training.max_steps, 6",
    ),
    (
        ["optimizer.schedule=constant", "optimizer.min_learning_rate_ratio=0.1"],
        "optimizer.min_learning_rate_ratio has no effect with optimizer.schedule constant",
    ),
    (
        ["optimizer.rounding=nearest"],
        "optimizer.rounding has no effect on weights and moments of float32",
    ),
    (["mesh.tensor=0"], "mesh.tensor is 0; expected a number of devices, or -1"),
    (
        ["mesh.data=-1"],
        "mesh leaves it to mesh.data and mesh.fsdp to take the devices that are left; expected one -1 at most",
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), BETWEEN_KEYS, ids=[overrides[-1] for overrides, _ in BETWEEN_KEYS])
def test_keys_that_contradict_each_other(file: Path, overrides: list[str], expected: str):
    assert expected in message(file, GOOD, *overrides)


def test_settings_that_look_odd_but_make_sense(file: Path):
    load(file, GOOD, "data.eval=[]", "samples.prompts=4")
    load(file, GOOD, "optimizer.learning_rate=3.0")
    load(file, GOOD, "training.row_length=256", "data.max_prompt_length=511")
    load(file, GOOD, "training.best_metric=eval_loss", "training.best_mode=min", "export.checkpoint=best")
    load(file, GOOD, "training.best_metric=eval_rewards/rejected", "training.best_mode=max")
    load(file, GOOD, "mesh={data: 2, fsdp: 2, tensor: 2}")
    load(file, GOOD, "reference.path=org/other", "reference.revision=main")
    load(file, GOOD, "reference={sync_steps: 512, mixup_alpha: 0.6}", "control.max_kl=5")
    load(file, GOOD, "objective={name: sft}", "training.eval_every=5", "control.early_stop={metric: eval_loss}")
    load(file, GOOD, "control.adaptive_beta={kl_low: 0, kl_high: 2}")
    load(file, GOOD, "training.max_steps=11", "reference.sync_steps=10", "optimizer.warmup_steps=10")
    early = ("control={max_kl: 5, early_stop: {metric: eval_loss, patience: 2}}", "training.eval_every=5")
    load(file, GOOD, "training.max_steps=11", *early)


STAGES = """\
stages:
  first: {model: {path: m}, data: {train: [{path: d}]}, objective: {name: sft}}
  second: {model: {path: "stage:first"}, data: {train: [{path: d}]}, objective: {name: sft}}
"""


def test_stages_start_from_earlier_stages_only(file: Path):
    run = load(file, GOOD + STAGES, "model.path=stage:second", "reference.path=stage:first")
    assert list(run.stages) == ["first", "second"]
    told = message(file, GOOD + STAGES, "stages.first.model.path=stage:second")
    assert 'stages.first.model.path is "stage:second", which names no earlier stage; expected another model' in told
    told = message(file, GOOD + STAGES, "model.path=stage:third")
    assert told.endswith("expected stage:first, stage:second.")


def test_stages_have_no_stages_and_no_place_of_their_own(file: Path):
    told = message(
        file,
        GOOD + STAGES,
        "stages.first.output_dir=x",
        "stages.second.stages={a: {model: {path: m}, data: {train: [{path: d}]}}}",
        "stages.bad/name={model: {path: m}, data: {train: [{path: d}]}}",
        "stages.second.data.train=[]",
    )
    assert "stages.first.output_dir: a stage has its place, OUTPUT_DIR/stages/first" in told
    assert "stages.second.stages: a stage cannot have stages of its own" in told
    assert "the name 'bad/name' becomes a folder" in told
    assert "stages.second.data.train is empty" in told
    assert "4 mistakes" in told


def test_a_run_made_in_python_is_checked_too():
    run = Run(model=ModelConfig(), data=DataConfig())
    assert [mistake.path for mistake in check(run)] == [(), ("model",), ("data", "train")]


# What a path or a name may hold: NUL may not, and ~ at the start would ask for a home.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0~"), min_size=1, max_size=20)
ODD = st.sampled_from(
    ["on", "5e7", "1e-3", "0o17", "010", "null", "~", "1_0", "2024-01-02", "a: b", "x\ny", " #x", "=", "<<"]
)


@settings(max_examples=60, deadline=None)
@given(name=TEXT | ODD, rate=st.floats(min_value=1e-300, max_value=1e300), seed=st.integers(0, 2**32 - 1))
def test_a_dumped_run_loads_as_the_same_run(
    tmp_path_factory: pytest.TempPathFactory, name: str, rate: float, seed: int
):
    file = tmp_path_factory.mktemp("dump") / "x.yaml"
    stage = Run(
        model=ModelConfig(
            scratch=Scratch(architecture={"model_type": name, "sizes": [1, 2.5, None, True, {"a": name}]})
        ),
        data=DataConfig(train=(DataSource(path=name, revision=name, weight=rate),), cache_dir=Path("~/x")),
        objective=IPO(normalize=False),
    )
    run = config_file.load(_written(file, GOOD), [f"training.seed={seed}", f"optimizer.learning_rate={rate!r}"])
    whole = Run(**{**run.__dict__, "stages": {"one": stage}})
    assert config_file.load(_written(file, config_file.dump(whole))) == whole


def _written(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def test_a_dumped_run_is_plain_yaml_for_others_too(file: Path):
    text = config_file.dump(load(file, GOOD))
    assert "learning_rate: 5.0e-07" in text
    assert "!!" not in text
    assert yaml.safe_load(text)["optimizer"]["learning_rate"] == 5e-7
    assert yaml.safe_load(text)["data"]["cache_dir"] == "~/.cache/jaxpo/data"


def test_the_schema_accepts_what_load_accepts_and_refuses_the_rest(file: Path):
    schema = config_file.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(config_file.as_mapping(load(file, GOOD + STAGES)))
    good = config_file.as_mapping(load(file, GOOD))
    for section, key, value in (
        ("training", "batch_size", 0),
        ("training", "batchsize", 1),
        ("objective", "name", "dop"),
        ("objective", "modifiers", [{"name": "wpoo"}]),
        ("objective", "divergence", {"name": "js", "alpha": 1.0}),
        ("model", "dtype", "float16"),
    ):
        assert not validator.is_valid({**good, section: {**good[section], key: value}})
