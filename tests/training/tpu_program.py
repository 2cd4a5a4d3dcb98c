"""Compile a whole train step for TPUs, on a machine that has none, and print what is in it as JSON.

python tpu_program.py TOPOLOGY FSDP SEQUENCE TENSOR [offload]       (with libtpu on the path)
"""

import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxpo.batch import DeviceBatch, Example
from jaxpo.config import OptimizerConfig
from jaxpo.data.pack import Packing, pack
from jaxpo.models import kept
from jaxpo.models.attention import choose
from jaxpo.models.decoder import DecoderConfig, Rotary, abstract_decoder
from jaxpo.objectives import DPO
from jaxpo.objectives.score import Scorer, head_blocks
from jaxpo.training.control import Control
from jaxpo.training.mesh import AXES, Layout, near_each_other
from jaxpo.training.offload import in_host_memory
from jaxpo.training.optimizer import make_optimizer
from jaxpo.training.step import TrainState, initial_carry, make_train_step

ROW, VOCABULARY = 1024, 4096
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY,
    width=256,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_width=512,
    mlp="gated",
    activation="silu",
    norm="rms",
    norm_eps=1e-5,
    positions=Rotary(10_000.0),
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    head="tied",
)


def main(topology: str, fsdp: int, sequence: int, tensor: int, offload: bool) -> None:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    sizes = (len(devices) // (fsdp * sequence * tensor), fsdp, sequence, tensor)
    mesh = Mesh(near_each_other(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    layout = Layout(mesh)
    packing = Packing(ROW, layout.batch_devices)
    scorer = Scorer(
        compute_dtype="bfloat16",
        remat="attention",
        blocks=head_blocks(ROW // sequence, 1, layout.platform, mesh.size),
        attention=choose(layout.platform, "bfloat16", CONFIG.head_dim),
        devices=layout,
    )
    optimizer = make_optimizer(OptimizerConfig(state_dtype="bfloat16", offload=offload), CONFIG, 10, 1.0)

    def start(decoder: Any) -> TrainState:
        carry = {name: jnp.float32(value) for name, value in initial_carry(DPO(), Control()).items()}
        return TrainState(jnp.zeros((), jnp.int32), decoder, optimizer.init(decoder), carry)

    state = layout.place(CONFIG, jax.eval_shape(start, abstract_decoder(CONFIG, "float32")))
    if offload:
        state = state._replace(optimizer=in_host_memory(state.optimizer))
    tokens = np.ones(200, np.int32)
    examples = [Example(str(n), tokens, (tokens, tokens)) for n in range(8)]
    batch = layout.arranged(pack(examples, np.zeros((8, 1, 2), np.float32), packing)[0])
    fields: list[Any] = [
        jax.ShapeDtypeStruct(np.shape(field), np.asarray(field).dtype, sharding=NamedSharding(layout.mesh, spec))
        for field, spec in zip(batch, layout.fields(batch), strict=True)
    ]
    step = jax.jit(make_train_step(DPO(), scorer, optimizer, Control()), donate_argnums=0)
    with kept.made_for("tpu"):
        compiled = step.lower(state, DeviceBatch(*fields)).compile()
    program = compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", program)}
    print(
        json.dumps(
            {
                "attention": scorer.attention,
                "block": scorer.blocks.tokens[0],
                "kernels": program.count('custom_call_target="tpu_custom_call"'),
                "square": [shape for shape in shapes if shape[-2:] == (ROW, ROW)],
                "logits": max(
                    [
                        int(np.prod(s))
                        for s in shapes
                        if s[0] in (VOCABULARY, VOCABULARY // tensor) and len(s) > 1 and s[1] != CONFIG.width
                    ]
                ),
                "on_host": memory.host_argument_size_in_bytes,
                "arguments": memory.argument_size_in_bytes,
                "peak": memory.peak_memory_in_bytes,
            }
        )
    )


if __name__ == "__main__":
    topology, fsdp, sequence, tensor, *more = sys.argv[1:]
    main(topology, int(fsdp), int(sequence), int(tensor), "offload" in more)
