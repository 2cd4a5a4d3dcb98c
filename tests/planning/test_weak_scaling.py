"""The predicted curve of weak scaling: a point of it by hand, and what no curve may do."""

from dataclasses import replace
from itertools import pairwise

import pytest
from test_speed import LLAMA_8B

from jaxpo.config import DataConfig, DataSource, ModelConfig, OptimizerConfig, Run, TrainingConfig
from jaxpo.models.families import decoder_config
from jaxpo.planning.hardware import CHIPS
from jaxpo.planning.weak_scaling import curve
from jaxpo.training.flops import Counts

MODEL = decoder_config(LLAMA_8B, "a test")
RUN = Run(
    model=ModelConfig(path="none", dtype="bfloat16"),
    data=DataConfig(train=(DataSource(path="none.jsonl"),)),
    training=TrainingConfig(batch_size=2, row_length=4096, rows_per_device=2),
    optimizer=OptimizerConfig(state_dtype="bfloat16"),
)
ROW = Counts(4096, 2 * 1_836_032, 2048)
BY_NAME = {chip.name: chip for chip in CHIPS}


@pytest.mark.parametrize("name", ["v5e", "v5p", "h100"])
def test_links_cost_more_the_more_chips_there_are(name: str) -> None:
    points = list(curve(RUN, MODEL, BY_NAME[name], [1, 8, 64, 256, 1024], ROW))
    assert [point.chips for point in points][-3:] == [64, 256, 1024]
    # 8 bytes a weight are more than one of these chips has.
    assert points[0].chips > 1
    efficiency = [point.efficiency for point in points]
    assert all(0 < point.serial <= point.efficiency <= 1 for point in points)
    assert all(later <= earlier + 1e-4 for earlier, later in pairwise(efficiency))
    assert all(0 < point.mfu < 1 for point in points)


def test_a_point_by_hand() -> None:
    """8 hosts of H100s: gradients of an eighth of the weights, in bfloat16, are summed over 50 GB/s, there and back."""
    (point,) = curve(RUN, MODEL, BY_NAME["h100"], [64], ROW)
    assert point.estimate.step.sizes == {"data": 8, "fsdp": 8, "sequence": 1, "tensor": 1}
    sums = 2 * 2 * 8_030_261_248 / 8 * 7 / 8 / 50e9
    assert point.estimate.times.exposed == pytest.approx(sums, rel=0.01)
    rest = point.estimate.times.total - point.estimate.times.exposed
    assert point.efficiency == pytest.approx(rest / (rest + sums), rel=0.01)


def test_slower_links_scale_worse() -> None:
    slow = replace(BY_NAME["h100"], between=12.5e9)
    (fast,), (slower,) = (curve(RUN, MODEL, chip, [64], ROW) for chip in (BY_NAME["h100"], slow))
    assert slower.efficiency < fast.efficiency
