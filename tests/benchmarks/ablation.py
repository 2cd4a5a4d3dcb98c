"""What each technique of the fast path gives: one of them taken away at a time, on the same batch of HH-RLHF.

    python tests/benchmarks/ablation.py --json OUT.json [--dtype float32] [--batch 8] [--repeats 3]

The time is that of a DPO step's loss and gradient of SmolLM2-135M, without the optimizer. A machine's speed drifts by
more than some techniques give, so that the whole fast path is timed right before each variant, and the median of such
pairs' ratios is reported. Each variant's loss and gradient norm stand beside its time: a technique changes neither.
What is of a process, as XLA's choice of kernels, is compared between processes of their own.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

from jaxpo import allocator

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
MODEL = Path("~/.cache/jaxpo-models/smollm2-135m-instruct").expanduser()
DATA = SHARED / "data" / "hh-rlhf" / "helpful-base-test.jsonl.gz"
# Settings of a process, which the script runs in processes of their own.
ENVIRONMENTS = {
    "XLA's own choice of kernels": {"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=+individual_dot"},
    "small pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
}


@dataclass(frozen=True)
class Setting:
    """The fast path, but for what is named here."""

    packed: bool = True
    share_prompt: bool = True
    score_prompt: bool = False
    attention: str = "blocked"
    reference_pass: bool = False
    plain_products: bool = False
    blocks: tuple[int, int | None] | None = None


VARIANTS = {
    "all": Setting(),
    "no packing: an example a row, padded, two rows at once": Setting(packed=False),
    "no shared prompt": Setting(share_prompt=False),
    "no reference table": Setting(reference_pass=True),
    "head on every token": Setting(score_prompt=True),
    "120 tokens and all words at the head": Setting(blocks=(120, None)),
    "dense attention": Setting(attention="dense"),
    "gradients of products by autodiff": Setting(plain_products=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--variants", type=json.loads, default=[*VARIANTS, *ENVIRONMENTS], help='a JSON list of names, "all" among them'
    )
    arguments = parser.parse_args()
    allocator.start_again_with_huge_pages()
    if not DATA.exists() or not (MODEL / "model.safetensors").exists():
        sys.exit(f"needs {DATA} and the weights in {MODEL}, as {SHARED / 'models' / 'get_smollm2.py'} writes them")
    report = measured(arguments)
    for name, environment in ENVIRONMENTS.items():
        if name in arguments.variants:
            usual = in_a_process_of_its_own(arguments, {})
            report[name] = in_a_process_of_its_own(arguments, environment)
            report[name]["slower"] = report[name]["seconds"] / usual["seconds"]
    arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"{'':40} seconds  slower  {'loss':>10} {'grad_norm':>10} places")
    for name, one in report.items():
        figures = f"{one['seconds']:7.2f} {one['slower']:6.2f}x {one['loss']:11.6f} {one['grad_norm']:10.4f}"
        print(f"{name:40} {figures} {one['places']:6}")


def in_a_process_of_its_own(arguments: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """The fast path in a process that was started with another environment."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        options = ["--dtype", arguments.dtype, "--batch", arguments.batch, "--repeats", arguments.repeats]
        command = [sys.executable, __file__, "--json", out, *options, "--variants", '["all"]']
        subprocess.run([str(part) for part in command], env={**os.environ, **environment}, check=True)
        return json.loads(out.read_text(encoding="utf-8"))["all"]


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    import jax

    from jaxpo import config_file
    from jaxpo.prepare import prepare
    from jaxpo.references import reference_logps

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [sys.executable, str(SHARED / "peers" / "hh_pairs.py"), str(DATA), str(rows), str(arguments.batch)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        config = Path(folder) / "dpo.yaml"
        config.write_text(
            json.dumps(
                {
                    "model": {"path": str(MODEL), "compute_dtype": arguments.dtype, "remat": "dots"},
                    "data": {"train": [{"path": str(rows)}], "max_length": 1024, "cache_dir": folder},
                    "objective": {"name": "dpo"},
                    "training": {"batch_size": arguments.batch},
                    "output_dir": folder,
                }
            ),
            encoding="utf-8",
        )
        run = config_file.load(config)
        parts = prepare(run, Path(folder))
        examples = [parts.train[i] for i in range(len(parts.train))]
        decoder = parts.load(parts.checkpoint)
        # Far from the policy: a first step's loss is the same whatever is computed.
        reference = jax.tree.map(lambda leaf: leaf * 1.01, decoder)
        table = reference_logps(parts, reference, parts.train)(range(len(examples)))[:, :1]
        steps = {
            name: prepared(parts, examples, decoder, reference, table, VARIANTS[name])
            for name in arguments.variants
            if name in VARIANTS
        }
    report: dict[str, Any] = {name: {**facts, "times": [], "beside": []} for name, (_, facts) in steps.items()}
    for _ in range(arguments.repeats):
        for name, (step, _) in steps.items():
            beside, seconds = seconds_of(steps["all"][0]), seconds_of(step)
            report[name]["beside"].append(beside)
            report[name]["times"].append(seconds)
            print(f"{name}: {seconds:.2f} s beside {beside:.2f} s", file=sys.stderr)
    for one in report.values():
        one["seconds"] = median(one["times"])
        one["slower"] = median(a / b for a, b in zip(one["times"], one["beside"], strict=True))
    return report


def seconds_of(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def prepared(
    parts: Any, examples: list[Any], decoder: Any, reference: Any, table: Any, setting: Setting
) -> tuple[Any, dict[str, Any]]:
    """A function that does a step, compiled, and what it found."""
    import jax
    import numpy as np

    from jaxpo.data.pack import Packing, pack
    from jaxpo.models import decoder as decoders
    from jaxpo.models.kept import named_anywhere
    from jaxpo.models.product import PRODUCT
    from jaxpo.objectives import DPO
    from jaxpo.objectives.logprobs import Blocks
    from jaxpo.objectives.score import all_scores, head_blocks
    from jaxpo.training.control import Control
    from jaxpo.training.optimizer import norm
    from jaxpo.training.step import initial_carry, sum_of_shares

    def plain(x: jax.Array, kernels: list[jax.Array], axes: int, splits: None = None) -> list[jax.Array]:
        del splits  # of one device there are none
        # Under the name by which a policy keeps them, so that nothing else is computed again.
        return [named_anywhere(jax.numpy.tensordot(x, kernel.astype(x.dtype), axes), PRODUCT) for kernel in kernels]

    packing = Packing(
        row_length=0,
        rows=1 if setting.packed else 2,
        packed=setting.packed,
        share_prompt=setting.share_prompt,
        score_prompt=setting.score_prompt,
    )
    prompts = np.array([len(e.prompt) for e in examples])
    sizes = packing.size(prompts, np.array([[len(c) for c in e.completions] for e in examples]))
    longest = int(min(sizes.sum(), 4096) if setting.packed else sizes.max())
    packing = dataclasses.replace(packing, row_length=-(-longest // 64) * 64)
    batch, _ = pack(examples, table, packing)
    blocks = head_blocks(packing.row_length, packing.rows, "cpu", 1)
    if setting.blocks is not None:
        blocks = Blocks((setting.blocks[0],), setting.blocks[1])
    scorer = dataclasses.replace(
        parts.scorer,
        attention=setting.attention,
        blocks=blocks,
    )
    gradients = sum_of_shares(DPO(), scorer)
    carry: Any = {name: np.float32(value) for name, value in initial_carry(DPO(), Control()).items()}

    def step(weights: Any, reference: Any, batch: Any) -> tuple[Any, ...]:
        if setting.reference_pass:
            logps = all_scores(scorer, reference, batch).logps[..., None, 1:]
            batch = batch._replace(references=jax.lax.stop_gradient(logps))
        (loss, _), grads = gradients(weights, batch, carry)
        return loss, norm(grads), grads

    on_device = parts.put(batch)
    products = mock.patch.object(decoders, "linears", plain) if setting.plain_products else nullcontext()
    with products:
        compiled = jax.jit(step).lower(decoder, reference, on_device).compile()
    loss, grad_norm, _ = jax.block_until_ready(compiled(decoder, reference, on_device))
    print(f"compiled: {setting}", file=sys.stderr)
    facts = {"loss": float(loss), "grad_norm": float(grad_norm), "places": int(batch.tokens.size)}
    return lambda: jax.block_until_ready(compiled(decoder, reference, on_device)), facts


if __name__ == "__main__":
    main()
