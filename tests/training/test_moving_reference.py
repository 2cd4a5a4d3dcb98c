"""A reference that follows the policy, against TRL, and against a reference that is kept as a model."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import config_file, run
from jaxpo.config import Run
from jaxpo.data.loader import Step
from jaxpo.data.pack import pack
from jaxpo.errors import UserError
from jaxpo.evaluation import plots
from jaxpo.models.decoder import Decoder
from jaxpo.models.export import export
from jaxpo.models.scratch import build
from jaxpo.prepare import Parts, prepare
from jaxpo.references import reference_logps
from jaxpo.training import loop
from jaxpo.training.loop import Ended, Loop
from jaxpo.training.moving_reference import Reference, Sync, mixed

Configured = Callable[..., Run]


@pytest.fixture
def configured(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configured:
    """The tiny DPO config with changes, its run to be in tmp_path/run; without plots, which take longest of all."""
    monkeypatch.setattr(plots, "write", lambda records, folder: None)

    def make(*changes: str) -> Run:
        return config_file.load(tiny / "dpo.yaml", [f"output_dir={tmp_path}/run", *changes])

    return make


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# As TRL does it

PLAIN = (
    "optimizer={learning_rate: 1.0e-3, schedule: constant, betas: [0.9, 0.95]}",
    "data.shuffle=false",
    "data.eval=[]",
    "training={batch_size: 8, row_length: 256, max_steps: 8}",
)


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_the_losses_are_those_of_trl(alpha: float, configured: Configured, tiny: Path) -> None:
    """Eight steps of AdamW with a sync after every second one."""
    pytest.importorskip("trl", reason="needs TRL, whose SyncRefModelCallback is the oracle")
    script = Path(__file__).with_name("trl_moving_reference.py")
    theirs = [sys.executable, script, tiny / "llama", tiny / "dpo.jsonl", str(alpha), "2", "8", "1e-3"]
    done = subprocess.run(theirs, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout.splitlines()[-1])
    folder = run.train(configured(*PLAIN, "reference.sync_steps=2", f"reference.mixup_alpha={alpha}"))
    assert [line["loss"] for line in records(folder)] == pytest.approx(expected, abs=1e-5)
    # With a fixed reference the third loss would not have come back up.
    assert expected[2] > expected[1] + 0.05


# As a model that is kept


@dataclass
class Seen:
    """What a run has worked with: batches and policies after each step, and what was scored at each move."""

    steps: dict[int, Step] = field(default_factory=dict)
    policies: dict[int, Any] = field(default_factory=dict)
    scored: list[list[int]] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found, original = Seen(), loop.train

    def watched(work: Loop, state: Any, reference: Reference, first: int, progress: Any) -> Ended:
        sync = work.sync
        assert sync is not None
        found.policies[0] = jax.device_get(state.decoder)

        def batches(start: int, end: int, references: Any) -> Iterator[Step]:
            for n, made in enumerate(work.batches(start, end, references), start + 1):
                found.steps[n] = made
                yield made

        def step(state: Any, batch: Any) -> Any:
            state, result = work.step(state, batch)
            found.policies[max(found.steps)] = jax.device_get(state.decoder)
            return state, result

        def score(decoder: Any, rows: Any) -> np.ndarray:
            found.scored.append(list(rows))
            return sync.score(decoder, rows)

        watching = replace(work, batches=batches, step=step, sync=replace(sync, score=score))
        return original(watching, state, reference, first, progress)

    monkeypatch.setattr(loop, "train", watched)
    return found


def references_in(parts: Parts, made: Step) -> np.ndarray:
    """What a packed batch holds of the reference, [n, Q, K], in the order of its examples."""
    _, places = pack([parts.train[i] for i in made.examples], None, parts.packing)
    return np.stack([made.batch.references[place] for place in places])


@pytest.mark.parametrize(
    ("alpha", "every", "changes"),
    [
        # 24 examples between two syncs out of 20: some are seen twice.
        (1.0, 3, ["data.train.0.limit=20", "training.num_epochs=3"]),
        (0.6, 2, ["training.eval_every=4"]),
        (0.25, 1, ["training.eval_every=4", "objective.modifiers=[{name: ld, alpha: 0.5}]"]),
    ],
)
def test_every_batch_has_the_log_probs_of_the_model_that_the_reference_is_by_then(
    alpha: float, every: int, changes: list[str], configured: Configured, seen: Seen, tmp_path: Path
) -> None:
    """Batches are made ahead of time: none may be made with what the reference was before."""
    config = configured(f"reference.sync_steps={every}", f"reference.mixup_alpha={alpha}", *changes)
    folder = run.train(config)
    parts = prepare(config, tmp_path / "run")
    place = parts.layout.decoder(parts.checkpoint.decoder_config, seen.policies[0])
    assert seen.steps.keys() == set(range(1, 7))

    def statistics(weights: Decoder, examples: Any, rows: Any) -> np.ndarray:
        return reference_logps(parts, jax.device_put(weights, place), examples)(rows)

    reference, moves = seen.policies[0], []
    for n in range(1, 7):
        rows = seen.steps[n].examples
        if n > 1 and (n - 1) % every == 0:
            before = statistics(reference, parts.train, rows)
            reference = jax.tree.map(lambda r, p: (1 - alpha) * r + alpha * p, reference, seen.policies[n - 1])
            moves.append(np.abs(statistics(reference, parts.train, rows) - before).mean())
        wanted = statistics(reference, parts.train, rows)
        np.testing.assert_allclose(references_in(parts, seen.steps[n]), wanted, rtol=1e-4, atol=1e-3)
    # A sync too early or too late would be hundreds of tolerances away.
    assert min(moves) > 0.5, moves
    assert json.loads((folder / "summary.json").read_text())["seconds"]["sync"] > 0.0

    # What is scored: the examples of the coming steps, each once.
    windows = [range(start + 1, min(start + every, 6) + 1) for start in range(every, 6, every)]
    for window in windows:
        rows = sorted({i for n in window for i in seen.steps[n].examples})
        chunks = [rows[at : at + 8] for at in range(0, len(rows), 8)]
        assert seen.scored[: len(chunks)] == chunks
        del seen.scored[: len(chunks)]
    assert seen.scored == []


def another_model(tiny: Path, folder: Path, **changes: int) -> Decoder:
    """One with other weights than the tiny model, and of the same shape but for the changes."""
    known = json.loads((tiny / "llama/config.json").read_text())
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "tie_word_embeddings", "initializer_range")
    other = build({name: known[name] for name in names} | changes, known["vocab_size"], {}, jax.random.key(7))
    export(other.decoder, other.hf_config, folder, tokenizer=tiny / "llama")
    return other.decoder


def test_another_model_as_a_reference_is_averaged_with_the_policy(
    configured: Configured, seen: Seen, tiny: Path, tmp_path: Path
) -> None:
    other = another_model(tiny, tmp_path / "other")
    path = f"reference.path={tmp_path}/other"
    config = configured(path, "reference.sync_steps=2", "reference.mixup_alpha=0.5", "training.max_steps=3")
    run.train(config)
    parts = prepare(config, tmp_path / "run")
    reference = jax.tree.map(lambda r, p: 0.5 * np.asarray(r) + 0.5 * p, other, seen.policies[2])
    place = parts.layout.decoder(parts.checkpoint.decoder_config, reference)
    wanted = reference_logps(parts, jax.device_put(reference, place), parts.train)(seen.steps[3].examples)
    np.testing.assert_allclose(references_in(parts, seen.steps[3]), wanted, rtol=1e-4, atol=1e-3)


def test_models_of_two_shapes_are_not_averaged(configured: Configured, tiny: Path, tmp_path: Path) -> None:
    another_model(tiny, tmp_path / "other", intermediate_size=32)
    path = f"reference.path={tmp_path}/other"
    with pytest.raises(UserError, match="its mlp_width is 32 and not 48"):
        run.train(configured(path, "reference.sync_steps=2", "reference.mixup_alpha=0.5"))
    run.train(configured(path, "reference.sync_steps=2", "training.max_steps=3"))


# Going on


def stop_in(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """SIGTERM comes while the at-th step of the next run is computed."""
    open_step, calls = loop.OpenStep, [0]

    def counting(*fields: Any) -> loop.OpenStep:
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return open_step(*fields)

    monkeypatch.setattr(loop, "OpenStep", counting)


def learnt(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.endswith("_per_s")}


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_a_run_that_is_ended_anywhere_goes_on_exactly(alpha: float, configured: Configured, tmp_path: Path) -> None:
    """In the first window, in a later one, and right before the reference moves."""
    moving = ("reference.sync_steps=2", f"reference.mixup_alpha={alpha}", "training.eval_every=3")
    whole = run.train(configured(*moving, f"output_dir={tmp_path}/whole"))
    ended = configured(*moving)
    for at in (1, 1, 1, 2):
        with pytest.MonkeyPatch.context() as patch:
            stop_in(patch, at)
            with pytest.raises(SystemExit):
                run.train(ended)
    out = run.train(ended)
    assert {path.name for path in (out / "checkpoints").iterdir()} >= {"5", "6"}
    assert list(map(learnt, records(out))) == list(map(learnt, records(whole)))
    a, b = ((folder / "export/model.safetensors").read_bytes() for folder in (out, whole))
    assert a == b


def test_what_a_resumed_run_may_not_change(configured: Configured) -> None:
    moving = ("reference.sync_steps=2", "training.max_steps=4")
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 3)
        with pytest.raises(SystemExit):
            run.train(configured(*moving))
    with pytest.raises(UserError, match=r"reference\.mixup_alpha was 1.0 and is 0.5"):
        run.train(configured(*moving, "reference.mixup_alpha=0.5"))
    run.train(configured(*moving, "logging.every=2", "training.eval_every=1"))


def test_held_out_metrics_are_against_the_first_reference(configured: Configured) -> None:
    """A hard sync right before the last step: against the new reference all rewards would be near 0."""
    folder = run.train(configured("reference.sync_steps=5", "training.eval_every=1"))
    lines = {line["step"]: line for line in records(folder)}
    assert lines[6]["eval_kl/abs"] > 0.8 * lines[5]["eval_kl/abs"] > 1.0
    assert lines[6]["kl/abs"] < 0.2 * lines[5]["kl/abs"]


# The parts


def test_an_average_takes_the_place_of_what_it_is_made_of() -> None:
    policy: Any = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2), jnp.bfloat16)}
    reference: Any = {"a": jnp.full(3, 10.0), "b": jnp.full((2, 2), 3.0, jnp.bfloat16)}
    found: Any = mixed(reference, policy, 0.25)
    np.testing.assert_array_equal(found["a"], [7.5, 7.75, 8.0])
    np.testing.assert_array_equal(found["b"].astype(jnp.float32), np.full((2, 2), 2.5))
    assert found["b"].dtype == jnp.bfloat16
    assert reference["a"].is_deleted()
    assert not policy["a"].is_deleted()


def test_windows() -> None:
    sync = Sync(3, 1.0, lambda first, last: [], lambda decoder, rows: np.zeros(0), 4)
    assert [n for n in range(10) if sync.due(n)] == [3, 6, 9]
    assert [sync.window_end(n) for n in range(7)] == [3, 3, 3, 6, 6, 6, 9]


def test_only_the_rows_of_the_coming_steps_are_replaced_and_in_a_new_table() -> None:
    """A checkpoint that holds the old table may still be on its way to the disk."""
    chunks: list[list[int]] = []

    def score(decoder: Any, rows: Any) -> np.ndarray:
        chunks.append(list(rows))
        return np.full((len(rows), 1, 2), decoder["w"], np.float32)

    sync = Sync(2, 1.0, lambda first, last: [1, 4, 5, 7, 8], score, 2)
    before = Reference(np.zeros((9, 1, 2), np.float32))
    policy: Any = {"w": 5.0}
    after = sync(before, policy, 2, 4)
    assert after.train is not None
    np.testing.assert_array_equal(after.train[:, 0, 1], [0, 5, 0, 0, 5, 5, 0, 5, 5])
    assert after.weights is None
    assert chunks == [[1, 4], [5, 7], [8]]
    assert before.train is not None
    assert not before.train.any()
