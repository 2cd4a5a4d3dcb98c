"""The command line: `python -m jaxpo.launch COMMAND`, or `jaxpo COMMAND`.

Nothing heavy is imported before the arguments are understood, so that `--help` and a typing mistake answer at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxpo.arguments import ROWS, SITUATION, parser_of

if TYPE_CHECKING:
    from jaxpo.config import Run
    from jaxpo.processes import Place

# The commands that run a model.
COMPUTING = ("train", "reference", "score")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 for a mistake of the user's, 130 if interrupted by the keyboard."""
    parser = parser_of(CALLS)
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

    run.train(config, _place(arguments), arguments.resume)


def _reference(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from jaxpo import run

    run.fill_reference(config, _place(arguments))


def _data(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from jaxpo import run

    run.inspect_data(config, arguments.stage, arguments.split, arguments.examples)


def _plan(arguments: argparse.Namespace) -> None:
    config = _load(arguments)
    from pathlib import Path

    from jaxpo import plan

    plan.show(
        config,
        arguments.stage,
        arguments.topology,
        arguments.tokens_per_example,
        search=arguments.search,
        compiles=arguments.compile,
        file=None if arguments.json is None else Path(arguments.json),
    )


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


CALLS = {
    "advise": _advise,
    "train": _train,
    "reference": _reference,
    "data": _data,
    "plan": _plan,
    "score": _score,
    "from-hf": _from_hf,
    "to-hf": _to_hf,
    "schema": _schema,
}


def _set_environment() -> None:
    """Defaults that libraries read when they are imported; what the user has set stays."""
    cache = os.path.join(os.path.expanduser("~"), ".cache", "jaxpo", "xla")  # noqa: PTH111, PTH118 - see arguments.parser_of
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        # Also the small programs: some dozens of them, compiled anew at each start, take a second.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
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
