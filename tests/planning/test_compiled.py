"""The plan against what XLA says of the compiled step: for simulated devices, and for TPUs where libtpu is there."""

import dataclasses
import os

import host_peak
import numpy as np
import pytest

from jaxpo.config import DataConfig, DataSource, MeshConfig, ModelConfig, OptimizerConfig, Run, TrainingConfig
from jaxpo.models.attention import Implementation
from jaxpo.models.decoder import Decoder, DecoderConfig
from jaxpo.planning.compiled import LIBTPU, measured
from jaxpo.planning.hardware import parse
from jaxpo.planning.memory import memory
from jaxpo.planning.search import MARGIN
from jaxpo.planning.work import Step, batches_of

needs_libtpu = pytest.mark.skipif(LIBTPU not in os.environ, reason=f"{LIBTPU} names no folder with libtpu")
MODEL = dataclasses.replace(
    host_peak.MODEL,
    vocab_size=32_768,
    width=1024,
    num_layers=12,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    mlp_width=4096,
)


def step(
    model: DecoderConfig, mesh: MeshConfig, remat: str, rows: int, row_length: int, batch_size: int, **optimizer: object
) -> Step:
    run = Run(
        model=ModelConfig(path="none", remat=remat),  # pyright: ignore[reportArgumentType]
        data=DataConfig(train=(DataSource(path="none.jsonl"),)),
        training=TrainingConfig(batch_size=batch_size, row_length=row_length, rows_per_device=rows),
        optimizer=OptimizerConfig(**optimizer),  # pyright: ignore[reportArgumentType]
        mesh=mesh,
    )
    third = row_length // 3
    batches = batches_of(np.array([third]), np.array([[third, third]]), run, None, "a test")
    return Step(run, model, batches, "tpu", "splash")


def test_without_libtpu_a_cpu_stands_in(small_decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIBTPU, raising=False)
    mesh = MeshConfig(data=1, fsdp=1, sequence=2, tensor=2)
    compiled_step, found = measured(step(small_decoder.config, mesh, "full", 1, 64, 2), parse("v5e:2x2"))
    assert (compiled_step.platform, compiled_step.attention, found.platform) == ("cpu", "blocked", "cpu")
    planned = memory(compiled_step)
    assert found.arguments == pytest.approx(planned.weights + planned.moments + planned.batch, rel=0.01)
    assert found.peak is not None
    assert found.peak > found.arguments


@pytest.mark.parametrize(
    ("attention", "sequence", "remat"), [("blocked", 4, "full"), ("blocked", 4, "none"), ("dense", 1, "full")]
)
def test_memory_of_shared_rows_and_of_scores_is_as_planned(
    attention: Implementation, sequence: int, remat: str
) -> None:
    """On simulated devices: keys and values of whole rows, and all pairs of a row where attention makes them."""
    model = dataclasses.replace(MODEL, vocab_size=2048, width=256, num_layers=4, head_dim=32, mlp_width=768)
    row_length = 8190 if sequence > 1 else 2046
    mesh = MeshConfig(data=1, fsdp=1, sequence=sequence)
    planned_for = step(model, mesh, remat, 1, row_length, 1).with_(platform="cpu", attention=attention)
    _, found = measured(planned_for, parse(f"h100x{sequence}"))
    assert found.peak is not None
    assert memory(planned_for).peak == pytest.approx(found.peak, rel=MARGIN)


@needs_libtpu
@pytest.mark.parametrize(
    ("fsdp", "tensor", "remat", "microbatches"),
    [(4, 1, "full", 1), (4, 1, "none", 1), (2, 2, "attention", 2)],
)
def test_memory_of_a_tpu_is_as_planned(fsdp: int, tensor: int, remat: str, microbatches: int) -> None:
    mesh = MeshConfig(data=4 // fsdp // tensor, fsdp=fsdp, tensor=tensor)
    planned_for = step(MODEL, mesh, remat, 2, 2046, 2 * 4 // tensor * microbatches)
    compiled_step, found = measured(planned_for, parse("v5e:2x2"))
    assert compiled_step == planned_for
    assert found.peak is not None
    assert memory(planned_for).peak == pytest.approx(found.peak, rel=MARGIN)


@needs_libtpu
def test_what_does_not_fit_is_told() -> None:
    large = dataclasses.replace(MODEL, width=8192, mlp_width=32_768, num_layers=4, num_heads=64)
    found = measured(step(large, MeshConfig(fsdp=4), "full", 1, 1023, 4), parse("v5e:2x2"))[1]
    assert found.peak is None
    assert "memory" in found.message
