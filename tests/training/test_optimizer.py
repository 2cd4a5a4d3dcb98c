"""Schedules against closed forms; clipping and AdamW against torch's."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpo.config import OptimizerConfig
from jaxpo.models.decoder import Decoder, DecoderConfig, Learned, map_params
from jaxpo.training.optimizer import clip, decays, learning_rate, make_optimizer, norm

PEAK, STEPS = 0.25, 20

GPT2_LIKE = DecoderConfig(
    vocab_size=11,
    width=4,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=2,
    mlp_width=8,
    mlp="plain",
    activation="gelu",
    norm="layer",
    norm_eps=1e-5,
    positions=Learned(8),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
    head="own",
)


def rates(**settings: Any) -> np.ndarray:
    schedule = learning_rate(OptimizerConfig(learning_rate=PEAK, **settings), STEPS)
    return np.array([schedule(n) for n in range(STEPS)])


def shape(schedule: str, done: float, floor: float) -> float:
    """The part of the peak that is left when `done` of the way after the warmup is."""
    falls = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]
    return falls if schedule == "constant" else floor + (1.0 - floor) * falls


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_their_closed_forms(schedule: str, floor: float, warmup: int) -> None:
    """Warmup: (step + 1) / (warmup + 1) of the peak; then the schedule, from the peak down to the floor."""
    expected = [
        PEAK * ((n + 1) / (warmup + 1) if n < warmup else shape(schedule, (n - warmup) / (STEPS - warmup), floor))
        for n in range(STEPS)
    ]
    found = rates(schedule=schedule, min_learning_rate_ratio=floor, warmup_steps=warmup)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert found[0] > 0
    assert found[warmup] == pytest.approx(PEAK)
    assert np.all(np.diff(found[: warmup + 1]) > 0)


def test_the_warmup_ratio_is_rounded_up_to_steps() -> None:
    np.testing.assert_array_equal(rates(warmup_ratio=0.23), rates(warmup_steps=5))
    np.testing.assert_array_equal(rates(warmup_ratio=0.9, warmup_steps=2), rates(warmup_steps=2))
    assert rates(warmup_ratio=1.0)[-1] < PEAK


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_past_its_end_a_schedule_stays_at_its_floor(schedule: str) -> None:
    config = OptimizerConfig(learning_rate=PEAK, schedule=schedule, min_learning_rate_ratio=0.2)  # pyright: ignore[reportArgumentType]
    for step in (STEPS, 10 * STEPS):
        np.testing.assert_allclose(learning_rate(config, STEPS)(step), 0.2 * PEAK, rtol=1e-6)


def test_weight_decay_spares_biases_and_norms() -> None:
    mask: dict[str, bool] = {}
    map_params(lambda path, decays: mask.update({path: decays}), decays(GPT2_LIKE))
    assert {path for path, decays in mask.items() if decays} == {
        "embedding",
        "position_embedding",
        "head",
        "blocks.attention.query.kernel",
        "blocks.attention.key.kernel",
        "blocks.attention.value.kernel",
        "blocks.attention.out.kernel",
        "blocks.mlp.up.kernel",
        "blocks.mlp.down.kernel",
    }
    spared = [path for path, decays in mask.items() if not decays]
    assert len(spared) == 14
    assert all("norm" in path or path.endswith(".bias") for path in spared)


def test_without_gradients_only_decayed_weights_shrink() -> None:
    decoder: Any = Decoder(GPT2_LIKE, jax.random.key(0), jnp.float32)
    decoder = jax.tree.map(lambda leaf: leaf + 1.0, decoder)
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(config, GPT2_LIKE, STEPS, 1.0)
    zero = jax.tree.map(jnp.zeros_like, decoder)
    updates, _ = optimizer.update(zero, optimizer.init(decoder), decoder)
    after = optax.apply_updates(decoder, updates)
    for leaf, before, decay in zip(*map(jax.tree.leaves, (after, decoder, decays(GPT2_LIKE))), strict=True):
        np.testing.assert_allclose(leaf, before * (0.95 if decay else 1.0), rtol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.5, None])
def test_clipping_and_adamw_are_torchs(max_grad_norm: float | None) -> None:
    """Five steps on least squares from the same start; the gradients are far above the limit at first, then below."""
    torch = pytest.importorskip("torch", reason="needs torch, whose AdamW is the oracle")
    decoder: Any = Decoder(GPT2_LIKE, jax.random.key(0), jnp.float32)
    targets = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), decoder)
    scales = (3.0, 0.5, 1e-3, 0.2, 1.0)
    config = OptimizerConfig(
        learning_rate=1e-2, schedule="cosine", warmup_steps=2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1
    )
    optimizer = make_optimizer(config, GPT2_LIKE, 5, max_grad_norm)

    def loss(params: Decoder, scale: float) -> jax.Array:
        differences = jax.tree.map(lambda p, t: jnp.square(p - t).sum(), params, targets)
        return scale * jax.tree.reduce(jnp.add, differences)

    leaves = [torch.tensor(np.array(leaf), requires_grad=True) for leaf in jax.tree.leaves(decoder)]
    goals = [torch.tensor(np.array(leaf)) for leaf in jax.tree.leaves(targets)]
    mask = jax.tree.leaves(decays(GPT2_LIKE))
    groups = [
        {"params": [p for p, m in zip(leaves, mask, strict=True) if m], "weight_decay": 0.1},
        {"params": [p for p, m in zip(leaves, mask, strict=True) if not m], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95), eps=1e-6)

    state, clipped = optimizer.init(decoder), []
    for n, scale in enumerate(scales):
        grads = jax.grad(loss)(decoder, scale)
        updates, state = optimizer.update(grads, state, decoder)
        decoder = optax.apply_updates(decoder, updates)

        oracle.zero_grad()
        torch.stack([scale * ((p - g) ** 2).sum() for p, g in zip(leaves, goals, strict=True)]).sum().backward()
        if max_grad_norm is not None:
            clipped.append(float(torch.nn.utils.clip_grad_norm_(leaves, max_grad_norm)) > max_grad_norm)
        for group in oracle.param_groups:
            group["lr"] = np.asarray(learning_rate(config, 5)(n)).item()
        oracle.step()
    assert max_grad_norm is None or set(clipped) == {True, False}
    for mine, theirs in zip(jax.tree.leaves(decoder), leaves, strict=True):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_the_norm_is_that_of_float64() -> None:
    rng = np.random.default_rng(0)
    # Of very different sizes, as gradients are: a plain sum over three axes is wrong by 1e-4 here.
    sizes = np.exp(2 * rng.normal(size=(30, 96, 1)))
    tree = {"a": (rng.normal(size=(30, 96, 512)) * sizes).astype(np.float32), "b": np.array([3.0, -4.0], np.float32)}
    exact = math.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in tree.values()))
    assert float(jax.jit(norm)(tree)) == pytest.approx(exact, rel=1e-6)
    assert float(norm({"zero": jnp.zeros(3)})) == 0.0


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e3])
def test_clipping_is_that_of_optax(limit: float) -> None:
    tree = {"a": jnp.linspace(-2.0, 3.0, 12).reshape(3, 4), "b": jnp.zeros(2)}
    ours, theirs = clip(limit), optax.clip_by_global_norm(limit)
    got: Any = ours.update(tree, ours.init(tree))[0]
    expected: Any = theirs.update(tree, theirs.init(tree))[0]
    for name in tree:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6)
