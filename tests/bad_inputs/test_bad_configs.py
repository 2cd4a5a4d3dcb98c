"""Bad configs: no YAML, wrong keys and values, settings that contradict each other or do nothing."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bench import Case

FILES = [
    Case("config/key_twice", ("config.yaml:10: training is there twice, in lines 8 and 10", "expected it once")),
    Case("config/tab", ("config.yaml:5: not valid YAML: a tab where YAML allows spaces only",)),
    Case("config/bracket_left_open", ("config.yaml:4: not valid YAML", "expected ',' or ']'")),
    Case("config/key_misspelt", ("config.yaml:9: training.batchsize is unknown; did you mean training.batch_size?",)),
    Case("config/section_misspelt", ("config.yaml:8: refrence is unknown; did you mean reference?",)),
    Case(
        "config/key_in_the_wrong_section",
        ("objective.learning_rate is unknown", "did you mean optimizer.learning_rate?"),
    ),
    Case("config/number_as_text", ('config.yaml:9: training.batch_size is "4"; expected an integer > 0',)),
    Case("config/colon_without_space", ("config.yaml:6: not valid YAML", "':'")),
    Case("config/section_is_a_list", ("config.yaml:9: training is the list", "expected a mapping with keys such as")),
    Case("config/source_is_text", ('data.train is "pairs.jsonl"; expected a list, each item a mapping',)),
    Case("config/python_object", ("config.yaml:11: output_dir", "expected a path")),
    Case("config/alias_unknown", ("config.yaml:11: not valid YAML: found undefined alias 'place'",)),
    Case("config/alias_of_itself", ("config.yaml", "nested too deeply; expected 32 levels at most")),
    Case("config/merge_of_no_mapping", ("config.yaml:7", "<<", "expected a mapping")),
    Case("config/two_documents", ("config.yaml:7: not valid YAML", "expected a single document")),
    Case("config/unprintable_character", ("config.yaml:11: the character '\\x07' is not allowed in YAML",)),
    Case("config/key_is_a_number", ("config.yaml:7: 1 is no key; expected text",)),
    Case("config/model_missing", ("config.yaml: model is missing; expected a mapping with keys such as path",)),
    Case("config/stage_of_itself", ('stages.sft.model.path is "stage:sft", which names no earlier stage',)),
    Case("config/stages_in_a_ring", ('stages.one.model.path is "stage:two", which names no earlier stage',)),
    Case("config/empty", ("config.yaml is empty; expected a mapping of keys",)),
    Case("config/comment_only", ("config.yaml is empty; expected a mapping of keys",)),
    Case("config/a_list", ('config.yaml holds the list ["model", "data"]; expected a mapping of keys',)),
    Case("config/a_sentence", ('config.yaml holds "train the model, please"; expected a mapping of keys',)),
    Case("config/json_cut", ("config.yaml:2: not valid YAML",)),
    Case("config/binary", ("config.yaml:1: the byte 0x80 is not UTF-8",)),
    Case("no such config", ("confi.yaml does not exist", "Did you mean config.yaml?"), command=("train", "confi.yaml")),
    Case(
        "a folder for a config",
        ("configs is a folder; expected a YAML config",),
        command=("train", "configs"),
        change=lambda f: (f / "configs").mkdir(),
    ),
    Case(
        "UTF-16 config",
        ("config.yaml:1: the byte 0xff is not UTF-8",),
        change=lambda f: (f / "config.yaml").write_text((f / "config.yaml").read_text(), encoding="utf-16"),
    ),
    Case(
        "nested without end",
        ("config.yaml is nested too deeply",),
        change=lambda f: (f / "config.yaml").write_text("[" * 5000),
    ),
]


def one(override: str, *tells: str, mended: tuple[str, ...] | None = None) -> Case:
    """A case of one bad override of the good config."""
    return Case(override, tells or (override.partition("=")[0],), (override,), mended=mended)


VALUES = [
    one("training.batch_size=0", "training.batch_size is 0; expected an integer > 0"),
    one("training.batch_size=4.0", "training.batch_size is 4.0; expected an integer > 0 (written 4)"),
    one("training.packing=yes", 'training.packing is "yes"; expected true or false (written true)'),
    one("training.seed=-1", "training.seed is -1; expected an integer >= 0"),
    one("training.seed=4294967296", "training.seed is 4294967296; expected an integer >= 0 and <= 4294967295"),
    one("training.max_grad_norm=0", "training.max_grad_norm is 0; expected a number > 0 or null"),
    one("training.best_metric=eval_acuracy", 'training.best_mode is missing, and the name "eval_acuracy" does not say'),
    Case(
        "best checkpoint by a metric that is none",
        ("training.best_metric is 'eval_acuracy'", "eval_logps/rejected, eval_loss"),
        ("training.best_metric=eval_acuracy", "training.best_mode=max"),
    ),
    one("training.best_metric=loss", 'training.best_metric is "loss"; expected a metric of the evaluation'),
    one("training.best_mode=maximum", 'training.best_mode is "maximum"; expected one of min, max or null', "mean max?"),
    one("training.best_mode=min", "training.best_mode", "training.best_metric"),
    one("optimizer.learning_rate=nan", 'optimizer.learning_rate is "nan"; expected a number > 0'),
    one("optimizer.learning_rate=.nan", "optimizer.learning_rate is .nan; expected a number of a sensible size"),
    one("optimizer.learning_rate=.inf", "optimizer.learning_rate is .inf; expected a number of a sensible size"),
    one("optimizer.learning_rate=1e999", "optimizer.learning_rate is 1e999; expected a number of a sensible size"),
    one("optimizer.learning_rate=-1e-5", "optimizer.learning_rate is -1e-05; expected a number > 0"),
    one("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1 is 1.0; expected a number >= 0 and < 1"),
    one("optimizer.betas=[0.9]", "optimizer.betas", "expected a list of 2"),
    one("optimizer.name=adam", 'optimizer.name is "adam"; expected adamw'),
    one("optimizer.schedule=cosin", 'optimizer.schedule is "cosin"', "did you mean cosine?"),
    one("optimizer.warmup_ratio=10", "optimizer.warmup_ratio is 10; expected a number >= 0 and <= 1"),
    one("optimizer.warmup_steps=2", "optimizer.warmup_steps is 2; expected less than training.max_steps, 1"),
    one("objective.name=dop", 'objective.name is "dop"; expected one of all_pairs, alphapo, ', "(did you mean dpo?)"),
    one("objective.beta=0", "objective.beta is 0; expected a number >= 1e-06"),
    one("objective.label_smoothing=0.5", "objective.label_smoothing is 0.5; expected a number >= 0 and < 0.5"),
    one("objective={name: nca, label_smoothing: 0.1}", "objective.label_smoothing is unknown; expected one of"),
    one("objective={beta: 0.1}", "objective.name is missing; expected one of all_pairs, alphapo, "),
    one("model.dtype=float16", 'model.dtype is "float16"; expected one of float32, bfloat16'),
    one("model.path=null", "model has neither path nor scratch"),
    one(
        "model.revision=main",
        "llama is a folder, which has no revision 'main'; leave model.revision",
    ),
    one("model.scratch={architecture: {model_type: llama}}", "model.scratch stands beside model.path"),
    one("data.train=[]", "data.train is empty; expected a list of at least one source"),
    one("data.train.0.limit=0", "data.train.0.limit is 0; expected an integer > 0 or null"),
    one("data.train.0.weight=-1", "data.train.0.weight is -1; expected a number > 0 or null"),
    one("data.train.1={path: answers.jsonl, weight: 2}", "data.train.0.weight is missing where other sources have one"),
    one("data.eval.0.weight=2", "data.eval.0.weight", "has no effect"),
    one("data.train.0.format=pair", 'data.train.0.format is "pair"', "did you mean pairs?"),
    one("data.train.5.path=x", "data.train is the list", "which has no 5"),
    one("data.max_prompt_length=128", "data.max_prompt_length is 128; expected less than data.max_length, 128"),
    one("data.workers=0", "data.workers is 0; expected an integer > 0 or null"),
    one("mesh.data=0", "mesh.data is 0; expected a number of devices, or -1"),
    one("mesh.data=-1", "mesh leaves it to mesh.data and mesh.fsdp", "expected one -1 at most"),
    one("mesh.tensor=3", "mesh is data=1, fsdp=-1, sequence=1, tensor=3", "8 cpu device(s)", "product is 8"),
    one("mesh={data: 2, fsdp: 2, tensor: 1}", "mesh is data=2, fsdp=2, sequence=1, tensor=1", "product is 8"),
    one("model.attention=splash", "model.attention splash cannot be used here", "runs on a tpu only", "Expected auto"),
    one("model.attention=cudnn", "it runs on a gpu only, and the devices are of platform cpu", "which is blocked"),
    one("mesh.tensor=16", "mesh is data=1, fsdp=-1, sequence=1, tensor=16", "8 cpu device(s)"),
    one("export.checkpoint=best", "export.checkpoint is best but training.best_metric is not set"),
    one("reference.sync_steps=0", "reference.sync_steps is 0; expected an integer > 0 or null"),
    one("reference={sync_steps: 2, mixup_alpha: 1.5}", "reference.mixup_alpha is 1.5; expected a number > 0 and <= 1"),
    one("reference.mixup_alpha=0.6", "reference.mixup_alpha has no effect without reference.sync_steps"),
    one("control.max_kl=0", "control.max_kl is 0; expected a number > 0 or null"),
    one("control.adaptive_beta={kl_low: 1}", "control.adaptive_beta.kl_high is missing"),
    one("control.adaptive_beta={kl_low: 3, kl_high: 2}", "control.adaptive_beta.kl_low is 3; expected less than"),
    one("control.early_stop={metric: eval_loss}", "control.early_stop needs evaluations on the way"),
    Case(
        "early stop by a metric that is none",
        ("control.early_stop.metric is 'eval_acuracy'", "eval_logps/rejected, eval_loss"),
        (
            "control.early_stop={metric: eval_acuracy, mode: max, patience: 1}",
            "training.eval_every=1",
            "training.max_steps=2",
        ),
    ),
    one("export.max_shard_gb=0", "export.max_shard_gb is 0; expected a number > 0"),
    one("logging.wandb=jaxpo", 'logging.wandb is "jaxpo"; expected a mapping with keys such as project'),
    one("logging.wandb={name: x}", "logging.wandb.project is missing; expected text"),
    one("reference.revision=main", "reference.revision has no effect without a hub id in reference.path"),
    one("output_dir=", "output_dir is missing; expected the folder to put the run into"),
    one("output_dir=~nobody-here/run", "output_dir", "~nobody-here"),
    one("output_dir=" + "x" * 300, "output_dir", "too long"),
    one('output_dir="a\\0b"', "output_dir", "NUL"),
    one("training.batch_size", "override training.batch_size: expected KEY=VALUE"),
    one("=3", "override =3: expected KEY=VALUE"),
    one("training..seed=3", "override training..seed=3: expected KEY=VALUE"),
    one("training.seed.first=3", 'training.seed is the mapping {"first": 3}; expected an integer'),
    one("training.seed=[", "override training.seed=[: not valid YAML"),
    one("trianing.seed=3", "override trianing.seed=3: trianing is unknown; did you mean training?"),
    one(
        "stages.a b={model: {path: llama}, data: {train: [{path: answers.jsonl}]}, objective: {name: sft}}",
        "stages: the name 'a b' becomes a folder",
    ),
    one(
        "training.eval_every=1000000000000000000000",
        "training.eval_every is 1000000000000000000000; expected a number of a sensible size",
    ),
    Case(
        "several mistakes at once",
        ("config.yaml: 3 mistakes", "(1)", "training.batch_size is -4", "(2)", "seed", "(3)", "mesh.dta is unknown"),
        ("training.batch_size=-4", "training.seed=x", "mesh.dta=1"),
    ),
    Case(
        "evaluation without data",
        ("training.eval_every is 5 but data.eval is empty",),
        ("data.eval=[]", "training.eval_every=5"),
    ),
    Case(
        "reference model for SFT",
        ("reference.path has no effect: the objective sft",),
        ("objective={name: sft}", "reference.path=llama"),
    ),
    Case(
        "reference table for SFT",
        ("objective.name is sft, which uses no reference model",),
        ("objective={name: sft}", "data.train.0.path=answers.jsonl"),
        command=("reference", "config.yaml"),
    ),
    Case(
        "eval data to inspect",
        ("data.eval is empty, so there is nothing to show",),
        ("data.eval=[]",),
        command=("data", "config.yaml", "--split", "eval"),
    ),
    Case(
        "warmup longer than the data",
        ("optimizer.warmup_steps is 7", "2 steps"),
        ("training.max_steps=null", "optimizer.warmup_steps=7"),
    ),
    Case(
        "a reference that the data end before it moves",
        ("reference.sync_steps is 7; expected less than the 2 steps of the run: the reference would never move",),
        ("training.max_steps=null", "reference.sync_steps=7"),
    ),
    Case(
        "a distance that the data end before it is looked at",
        ("control.max_kl is looked at every 10 steps (logging.every); expected less than the 2 steps of the run",),
        ("training.max_steps=null", "control.max_kl=5"),
    ),
    Case(
        "an early stop that the data end before",
        ("control.early_stop ends no run before step 3, patience", "expected less than the 2 steps of the run"),
        ("training.max_steps=null", "training.eval_every=1", "control.early_stop={metric: eval_loss}"),
    ),
]

CASES = FILES + VALUES


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_configs(case: Case, refused: Callable[[Case], None]):
    refused(case)


@pytest.mark.parametrize(
    ("override", "module", "tells"),
    [
        (
            "logging.tensorboard=true",
            "tensorboardX",
            ("logging.tensorboard is asked for, but tensorboardX is not", "pip install"),
        ),
        (
            "logging.wandb={project: p}",
            "wandb",
            ("logging.wandb is asked for, but wandb is not installed", "pip install"),
        ),
    ],
)
def test_loggers_that_are_not_installed_are_told_before_any_work(
    override: str,
    module: str,
    tells: tuple[str, ...],
    refused: Callable[[Case], None],
    monkeypatch: pytest.MonkeyPatch,
    bench: Path,
):
    monkeypatch.setitem(sys.modules, module, None)
    refused(Case(override, tells, (override,)))
    assert not (bench / "cache").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_config_that_may_not_be_read(refused: Callable[[Case], None]):
    refused(
        Case(
            "unreadable",
            ("config.yaml cannot be read (Permission denied)",),
            change=lambda f: (f / "config.yaml").chmod(0),
        )
    )
