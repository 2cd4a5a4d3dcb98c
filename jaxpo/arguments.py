"""What the command line takes: its commands, their flags, and the help that tells of them.

Nothing heavy is imported here: `--help` and a typing mistake answer at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jaxpo

Call = Callable[[argparse.Namespace], None]

# Help is broken by hand, to fit the narrowest terminals, so that lists and examples stay as they are.
DESCRIPTION = """\
Align language models with preferences: from a Hugging Face checkpoint and
preference data to an aligned Hugging Face checkpoint.

commands:
  advise     say which objective and config to start with
  train      train a model as a config says
  reference  compute the reference model's log-probs only
  data       show what the trainer will see of the data
  plan       say whether a run fits its devices, and how fast it can be
  score      rate the answers of rows with a reward model
  convert    convert a checkpoint from or to Hugging Face
  schema     print the JSON schema of a config, for editors
"""

EPILOG = """\
examples:
  %(prog)s train configs/quickstart.yaml
  %(prog)s train configs/quickstart.yaml training.seed=1
  %(prog)s data configs/quickstart.yaml --stage sft
  %(prog)s train --help

A mistake in a config, the data or a checkpoint ends with exit code 2 and a
paragraph that says where it is, what was found and what was expected.
"""

OVERRIDES = """
KEY=VALUE takes the place of a value of the config. VALUE is YAML:
  training.batch_size=32           training.max_steps=null
  data.train.0.path=pairs.jsonl    optimizer.betas='[0.9, 0.99]'
  stages.sft.training.seed=1       objective='{name: ipo, beta: 0.2}'
"""

ADVISE = """\
Say which objective fits what you have: why, what its rows look like, whether
it needs a reference, which config to copy, and the command. On a terminal it
asks; with a flag for the data, and any of the others, it answers at once.
"""

ROWS = {
    "pairs": "two answers, and which one is better",
    "labels": "one answer, and whether it is desirable",
    "rankings": "several answers, in order or with ratings",
    "demonstrations": "one good answer",
    "prompts": "a prompt, and no answer",
}
# The fields of `advise.Answers`, by flag.
SITUATION = {
    "base-model": ("base_model", "the model was never tuned to answer"),
    "noisy": ("noisy", "many judgements are wrong or disputed"),
    "probabilities": ("probabilities", "rows say how sure a judgement is"),
    "scores": ("scores", "rows rate the answers with numbers"),
    "length-bias": ("wordy", "the better answers are mostly the longer ones"),
    "right-or-wrong": ("exact", "answers are right or wrong, as of mathematics"),
    "weak-chosen": ("weak_chosen", "the model writes better than the good answers"),
    "tight": ("tight", "no memory or time for a pass of a reference"),
    "judge": ("reward", "a reward model or a program judges answers"),
}

TRAIN = """\
Train as the config says: its stages first, then the run itself. The folder
output_dir receives config.yaml, metrics.jsonl, summary.json, plots/,
checkpoints/ and export/, which holds a Hugging Face checkpoint. A run that was
killed goes on from its last checkpoint when the same command is given again.
"""

REFERENCE = """\
Compute the reference model's log-probs of every completion of data.train and
data.eval, and keep them in reference.cache_dir. `train` does this by itself;
alone it prepares the table for many runs to share. What the table holds
already is not computed again.
"""

DATA = """\
Show what the trainer will see of the data: examples token by token with their
completions marked, the lengths, how full the packed rows are, and which rows
are dropped and why.
"""

PLAN = """\
Say what a run takes, before it runs: memory on each device by kind, arithmetic,
what crosses devices, the time of a step at best, and what to change if it does
not fit. No weights are read, and data only where it is tokenised already.
"""

SCORE = """\
Rate the answers of rows with a reward model. Each row is written with what
the model says of it: a pair with chosen_score and rejected_score, a list
`completions` with scores, a single answer with rewards. Rows that cannot be
scored are left out, counted and told.
"""

CONVERT = """\
Convert a checkpoint between Hugging Face and jaxpo. `train` does it by itself:
it reads Hugging Face checkpoints and exports one at its end.

directions:
  from-hf PATH OUT                                  from Hugging Face to jaxpo
  to-hf RUN_OR_CHECKPOINT OUT [--dtype DTYPE]       from jaxpo to Hugging Face
"""

FROM_HF = """\
Make a jaxpo checkpoint of a Hugging Face one. Safetensors, in one file or in
many, are streamed tensor by tensor.
"""

TO_HF = """\
Make a Hugging Face folder of a checkpoint: safetensors, config, generation
config, tokenizer and chat template.
"""

SCHEMA = """\
Print the JSON schema of a config. An editor with YAML support then completes
and checks the keys of a config that begins with this line:
  # yaml-language-server: $schema=jaxpo.schema.json
"""


def parser_of(calls: Mapping[str, Call]) -> argparse.ArgumentParser:
    """The parser of the command line. calls: what each command does with what it is given, by its name."""
    invoked = os.path.basename(sys.argv[0])  # noqa: PTH119 - importing pathlib takes longer than all of the parsing
    prog = "jaxpo" if invoked == "jaxpo" else "python -m jaxpo.launch"
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} COMMAND ...",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxpo {jaxpo.__version__}", help="print the version")
    commands = parser.add_subparsers(prog=prog, metavar="COMMAND", dest="command", help=argparse.SUPPRESS)

    advise = _command(commands, "advise", ADVISE, calls["advise"])
    advise.set_defaults(parser=advise)
    rows = advise.add_argument_group("what a row of your data holds").add_mutually_exclusive_group()
    for name, text in ROWS.items():
        rows.add_argument(f"--{name}", dest="data", action="store_const", const=name, help=text)
    more = advise.add_argument_group("what else is so")
    for name, (field, text) in SITUATION.items():
        more.add_argument(f"--{name}", dest=field, action="store_true", help=text)
    wanted = advise.add_argument_group("what you want, if not a better model")
    wanted.add_argument(
        "--reward-model", dest="goal", action="store_const", const="scorer", default="policy", help="to rate answers"
    )
    advise.usage = f"{advise.prog} [--pairs | --labels | --rankings | ...] [...]"
    _examples(advise, "--pairs --noisy", "--prompts --judge")

    train = _command(commands, "train", TRAIN, calls["train"])
    _takes_config(train)
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: go on with what output_dir holds, if anything (default); never: refuse to; PATH: go on from "
        "another run of the same config, or from RUN/checkpoints/STEP",
    )
    _takes_place(train)
    _examples(train, "configs/quickstart.yaml", "configs/quickstart.yaml training.seed=1 output_dir=runs/b")

    reference = _command(commands, "reference", REFERENCE, calls["reference"])
    _takes_config(reference)
    _takes_place(reference)
    _examples(reference, "config.yaml reference.cache_dir=/shared/reference")

    data = _command(commands, "data", DATA, calls["data"])
    _takes_config(data)
    data.add_argument("--examples", type=_count, default=3, metavar="N", help="examples to show in full (default 3)")
    data.add_argument("--split", choices=["train", "eval"], default="train", help="of the config (default train)")
    data.add_argument("--stage", metavar="NAME", help="of a stage of the config (default: of the run itself)")
    _examples(data, "configs/quickstart.yaml --stage sft", "config.yaml --split eval --examples 1")

    plan = _command(commands, "plan", PLAN, calls["plan"])
    _takes_config(plan)
    plan.add_argument("--stage", metavar="NAME", help="a stage of the config (default: the run itself)")
    plan.add_argument(
        "--topology",
        metavar="KIND",
        help="plan for these devices: v5e:8x8, v5px64, h100x16 ... (default: the devices of this machine)",
    )
    plan.add_argument(
        "--tokens-per-example",
        type=_lengths,
        metavar="P,C[,C]",
        help="tokens of a prompt and of each of its completions (default: those of the data, if it is tokenised)",
    )
    plan.add_argument("--search", action="store_true", help="rank meshes, rows_per_device and remat by step time")
    plan.add_argument("--compile", action="store_true", help="compile the step and compare what XLA says of memory")
    plan.add_argument("--json", metavar="FILE", help="write all figures to a file")
    _examples(
        plan,
        "config.yaml --topology h100x8",
        "config.yaml --topology v5e:8x8 --search --tokens-per-example 120,60,60",
    )

    score = _command(commands, "score", SCORE, calls["score"])
    score.add_argument("model", metavar="MODEL", help="a reward model: a folder, or its id on the hub")
    score.add_argument("rows", metavar="ROWS", help="a file, a folder, or a dataset's id on the hub")
    score.add_argument("--output", required=True, metavar="FILE", help="the .jsonl file to make")
    score.add_argument("--split", default="train", metavar="NAME", help="of the dataset (default train)")
    score.add_argument("--format", default="auto", metavar="NAME", help="how rows are read (default: by their columns)")
    score.add_argument(
        "--chat-template", metavar="NAME", help="a file or a built-in name (default: the tokenizer's own)"
    )
    score.add_argument(
        "--max-length",
        type=_tokens,
        metavar="N",
        help="tokens of a prompt with one answer; longer answers lose their end, a row whose prompt fills them is left "
        "out (default: no limit)",
    )
    dtypes = ["float32", "bfloat16"]
    score.add_argument(
        "--compute-dtype", choices=dtypes, default="float32", help="of matrix products (default float32)"
    )
    _examples(score, "runs/reward/export pairs.jsonl --output rated.jsonl")

    convert = _command(commands, "convert", CONVERT)
    _examples(convert, "from-hf org/model here", "to-hf runs/quickstart exported")
    convert.usage = f"{convert.prog} DIRECTION PATH OUT"
    directions = convert.add_subparsers(
        prog=convert.prog, metavar="DIRECTION", dest="direction", required=True, help=argparse.SUPPRESS
    )
    from_hf = _command(directions, "from-hf", FROM_HF, calls["from-hf"])
    from_hf.add_argument("source", metavar="PATH", help="a folder, or a model's id on the hub")
    from_hf.add_argument("out", metavar="OUT", help="the folder to make")
    _examples(from_hf, "HuggingFaceTB/SmolLM2-135M-Instruct checkpoints/smollm2")
    to_hf = _command(directions, "to-hf", TO_HF, calls["to-hf"])
    to_hf.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's output_dir, or a checkpoint in it")
    to_hf.add_argument("out", metavar="OUT", help="the folder to make")
    to_hf.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: as they are)")
    _examples(to_hf, "runs/quickstart exported", "runs/quickstart exported --dtype bfloat16")

    schema = _command(commands, "schema", SCHEMA, calls["schema"])
    _examples(schema, "> jaxpo.schema.json")
    return parser


def _command(group: Any, name: str, description: str, call: Call | None = None) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    command = group.add_parser(name, description=description, formatter_class=layout, allow_abbrev=False)
    if call is not None:
        command.set_defaults(call=call)
    return command


def _takes_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a YAML file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="changes to the config")
    command.epilog = OVERRIDES


def _takes_place(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "several processes",
        "SLURM and Open MPI (one for each GPU) and TPU pods on GKE (one for each host)\n"
        "tell each its place; elsewhere these flags do (one for each host, say), or\n"
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where the first process listens")
    group.add_argument("--processes", metavar="N", help="how many there are")
    group.add_argument("--process", metavar="I", help="which one this is, from 0")


def _examples(command: argparse.ArgumentParser, *lines: str) -> None:
    shown = "".join(f"  %(prog)s {line}\n" for line in lines)
    command.epilog = f"examples:\n{shown}{command.epilog or ''}"


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of examples")
    return int(text)


def _lengths(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) < 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not P,C[,C]: tokens of a prompt and of its completions")
    return tuple(map(int, parts))


def _tokens(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens above 0")
    return int(text)
