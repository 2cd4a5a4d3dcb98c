"""The command line: `python -m jaxpo.launch COMMAND`, or `jaxpo COMMAND`.

Nothing heavy is imported before the arguments are understood, so that `--help` and a typing mistake answer at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jaxpo

if TYPE_CHECKING:
    from jaxpo.config import Run
    from jaxpo.processes import Place

# Help is broken by hand, to fit the narrowest terminals, so that lists and examples stay as they are.
DESCRIPTION = """\
Align language models with preferences: from a Hugging Face checkpoint and
preference data to an aligned Hugging Face checkpoint.

commands:
  advise     say which objective and config to start with
  train      train a model as a config says
  reference  compute the reference model's log-probs only
  data       show what the trainer will see of the data
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

# The commands that run a model.
COMPUTING = ("train", "reference", "score")

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 for a mistake of the user's, 130 if interrupted by the keyboard."""
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    # argparse takes no more positional arguments once options have come between them; overrides may stand anywhere.
    late = [text for text in rest if "overrides" in known and "=" in text and not text.startswith("-")]
    if late:
        known.overrides = [*known.overrides, *late]
    if unknown := [text for text in rest if text not in late]:
        hint = " (an override is written KEY=VALUE, without dashes)" if any("=" in text for text in unknown) else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if "call" not in known:
        parser.print_help(sys.stderr)
        return 2

    from jaxpo import allocator
    from jaxpo.errors import UserError

    if arguments is None and known.command in COMPUTING:
        allocator.start_again_with_huge_pages()
    _set_environment()
    _quieten()
    try:
        known.call(known)
        sys.stdout.flush()
    except UserError as error:
        print(_paragraph(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command goes on from the last checkpoint" if known.command == "train" else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output, `head` say, has seen enough.
        _discard_output()
        return 141
    except OSError as error:
        if not _output_fails():
            raise
        _discard_output()
        print(f"error: the output cannot be written: {error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


def _output_fails() -> bool:
    """Whether stdout takes nothing more, as on a full disk; the error of a write does not say of what file it is."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _discard_output() -> None:
    """What is left to be printed goes nowhere: flushed when Python ends, it would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _advise(arguments: argparse.Namespace) -> None:
    import shutil

    from jaxpo import dialogue
    from jaxpo.advise import Answers, without_effect
    from jaxpo.errors import UserError

    parser: argparse.ArgumentParser = arguments.parser
    given = vars(arguments)
    flags = {field: True for field, _ in SITUATION.values() if given[field]}
    if arguments.data is not None:
        answers = Answers(data=arguments.data, goal=arguments.goal, **flags)
        if idle := without_effect(answers):
            names = {field: f"--{name}" for name, (field, _) in SITUATION.items()}
            scorer = ["--reward-model"] if arguments.goal == "scorer" else []
            rest = [f"--{arguments.data}", *scorer, *(names[field] for field in flags if field not in idle)]
            have, them = ("has", "it") if len(idle) == 1 else ("have", "them")
            said = ", ".join(names[field] for field in idle)
            raise UserError(f"{said} {have} no effect with {' '.join(rest)}; leave {them} out.")
    elif not flags and arguments.goal == "policy" and sys.stdin.isatty():
        try:
            answers = dialogue.dialogue(input)
        except EOFError:
            raise KeyboardInterrupt from None
        print()
    else:
        flags_of_data = ", ".join(f"--{name}" for name in ROWS)
        parser.error(f"what does a row of the data hold? expected one of {flags_of_data} (see --help)")
    print(dialogue.text(answers, min(100, shutil.get_terminal_size().columns)))


def _load(arguments: argparse.Namespace) -> "Run":
    from pathlib import Path

    from jaxpo import config_file

    return config_file.load(Path(arguments.config), arguments.overrides)


def _place(arguments: argparse.Namespace) -> "Place | None":
    from jaxpo import processes

    flags = {f"--{name}": getattr(arguments, name) for name in ("coordinator", "processes", "process")}
    return processes.place(flags, os.environ)


# The config is read before `run` is imported, which takes seconds: a mistake in it is told without delay.


def _train(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from jaxpo import run

    run.train(config, _place(arguments))


def _reference(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from jaxpo import run

    run.fill_reference(config, _place(arguments))


def _data(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from jaxpo import run

    run.inspect_data(config, arguments.stage, arguments.split, arguments.examples)


def _score(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from jaxpo import rating

    rating.rate(
        arguments.model,
        arguments.rows,
        Path(arguments.output),
        split=arguments.split,
        format=arguments.format,
        chat_template=arguments.chat_template,
        max_length=arguments.max_length,
        compute_dtype=arguments.compute_dtype,
    )


def _from_hf(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from jaxpo import conversion

    conversion.from_hf(arguments.source, Path(arguments.out))


def _to_hf(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from jaxpo import conversion

    conversion.to_hf(Path(arguments.source), Path(arguments.out), arguments.dtype)


def _schema(arguments: argparse.Namespace) -> None:
    import json

    from jaxpo import config_file

    print(json.dumps(config_file.schema(), indent=2))


def _parser() -> argparse.ArgumentParser:
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

    advise = _command(commands, "advise", ADVISE, _advise)
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

    train = _command(commands, "train", TRAIN, _train)
    _takes_config(train)
    _takes_place(train)
    _examples(train, "configs/quickstart.yaml", "configs/quickstart.yaml training.seed=1 output_dir=runs/b")

    reference = _command(commands, "reference", REFERENCE, _reference)
    _takes_config(reference)
    _takes_place(reference)
    _examples(reference, "config.yaml reference.cache_dir=/shared/reference")

    data = _command(commands, "data", DATA, _data)
    _takes_config(data)
    data.add_argument("--examples", type=_count, default=3, metavar="N", help="examples to show in full (default 3)")
    data.add_argument("--split", choices=["train", "eval"], default="train", help="of the config (default train)")
    data.add_argument("--stage", metavar="NAME", help="of a stage of the config (default: of the run itself)")
    _examples(data, "configs/quickstart.yaml --stage sft", "config.yaml --split eval --examples 1")

    score = _command(commands, "score", SCORE, _score)
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
    from_hf = _command(directions, "from-hf", FROM_HF, _from_hf)
    from_hf.add_argument("source", metavar="PATH", help="a folder, or a model's id on the hub")
    from_hf.add_argument("out", metavar="OUT", help="the folder to make")
    _examples(from_hf, "HuggingFaceTB/SmolLM2-135M-Instruct checkpoints/smollm2")
    to_hf = _command(directions, "to-hf", TO_HF, _to_hf)
    to_hf.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's output_dir, or a checkpoint in it")
    to_hf.add_argument("out", metavar="OUT", help="the folder to make")
    to_hf.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: as they are)")
    _examples(to_hf, "runs/quickstart exported", "runs/quickstart exported --dtype bfloat16")

    schema = _command(commands, "schema", SCHEMA, _schema)
    _examples(schema, "> jaxpo.schema.json")
    return parser


def _command(
    group: Any, name: str, description: str, call: Callable[[argparse.Namespace], None] | None = None
) -> argparse.ArgumentParser:
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


def _tokens(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens above 0")
    return int(text)


def _set_environment() -> None:
    """Defaults that libraries read when they are imported; what the user has set stays."""
    cache = os.path.join(os.path.expanduser("~"), ".cache", "jaxpo", "xla")  # noqa: PTH111, PTH118 - see _parser
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        # Notes of XLA, gRPC and transformers ("PyTorch was not found …") that are no concern of the user's.
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "GRPC_VERBOSITY": "ERROR",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        # Tokenising runs in processes of its own; threads besides would only make the library warn about forks.
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _quieten() -> None:
    """Leave it to UserErrors to tell what goes wrong with a checkpoint: orbax and asyncio would too, with tracebacks.

    Orbax logs as an error what it raises, once for each of its threads that a full disk stops. When one of its many
    reads fails, the others are given up; each reports then that nobody waits for it any more.
    """
    import logging

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    others = sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        abandoned = (
            str(unraisable.exc_value) == "Event loop is closed" or type(unraisable.object).__name__ == "coroutine"
        )
        if not abandoned:
            others(unraisable)

    sys.unraisablehook = report


def _paragraph(text: str) -> str:
    """The text as one paragraph, broken at the width of the terminal if it goes to one."""
    import shutil
    import textwrap

    text = " ".join(text.split())
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
