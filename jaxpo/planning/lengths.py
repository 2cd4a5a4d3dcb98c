"""How long a run's examples are: as told, as they were tokenised last, or as long as they may be."""

from typing import NamedTuple

import numpy as np

from jaxpo.config import Run
from jaxpo.data import dataset
from jaxpo.data.loader import Source
from jaxpo.data.mismatch import Mismatched
from jaxpo.errors import UserError


class Lengths(NamedTuple):
    """Tokens of prompts [N] and completions [N, K], and where they come from, for people."""

    prompts: np.ndarray
    completions: np.ndarray
    origin: str


def lengths(run: Run, told: tuple[int, ...] | None) -> Lengths:
    """Of the examples of data.train. told: of a prompt and of each of its completions, of every example."""
    if told is not None:
        return _told(run, told)
    return _last(run) or _longest(run)


def _told(run: Run, told: tuple[int, ...]) -> Lengths:
    prompt, *completions = told
    K = run.objective.num_completions
    if len(completions) != K:
        example = ",".join(["120", *["60"] * K])
        raise UserError(
            f"--tokens-per-example is {','.join(map(str, told))}, a prompt and {len(completions)} completions; the "
            f"objective {run.objective.name} has {K} of them: expected such as {example}."
        )
    return Lengths(np.array([prompt]), np.array([completions]), "--tokens-per-example")


def _last(run: Run) -> Lengths | None:
    """From the cache of tokenised data, if it holds every source."""
    objective = run.objective
    K = 1 if objective.feedback == "label" else objective.num_completions
    found: list[Source] = []
    for source in run.data.train:
        known = dataset.last(source, run.data, objective.feedback, K)
        if known is None:
            return None
        found.append(Mismatched(known, run.data.max_length) if objective.num_completions > K else known)
    prompts = np.concatenate([source.prompt_lengths for source in found])
    return Lengths(
        prompts,
        np.concatenate([source.completion_lengths for source in found]),
        f"{len(prompts):,} examples of data.train, as tokenised last",
    )


def _longest(run: Run) -> Lengths:
    """As long as the settings let examples be, in a row: half a prompt where max_prompt_length does not say."""
    data, K = run.data, run.objective.num_completions
    prompt = data.max_prompt_length or data.max_length // 2
    room = run.training.row_length // (1 if run.training.share_prompt else K)
    prompt = max(1, min(prompt, room // 2))
    each = (room - prompt) // K if run.training.share_prompt else room - prompt
    completion = max(1, min(data.max_length - prompt, each))
    origin = (
        f"assumed, as data.train is not tokenised yet: {prompt} + {' + '.join([str(completion)] * K)} tokens an "
        "example, the most that data.max_length allows (--tokens-per-example tells better)"
    )
    return Lengths(np.array([prompt]), np.array([[completion] * K]), origin)
