"""A decoder-only transformer as a plain pytree: layers are stacked on a leading axis and scanned.

The decoder knows nothing of packing, caches or devices: the caller hands in `attend`, which turns queries, keys and
values into outputs. `families` says which Hugging Face model is which `DecoderConfig`.

Shape legend: R rows, T tokens of a row, D model width, N query heads, K key and value heads, H head size, F width of
the MLP, V vocabulary, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpo.models.kept import named_anywhere, recomputed
from jaxpo.models.product import PRODUCT, Parts, Split, linears

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
CachedAttend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Remat = Literal["none", "full", "dots", "attention", "offload"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
Head = Literal["tied", "own", "score"]
Leaf = TypeVar("Leaf")

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, those between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding over the whole head."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True)
class Learned:
    """A learned embedding for each of `max_positions` positions."""

    max_positions: int


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes a decoder's computation.

    head: what becomes of hidden states: logits, by the embedding (`tied`) or by a matrix of its own (`own`), or one
    number each, a reward (`score`). window: sliding attention window in tokens, for the caller's attend. residual_std:
    initial standard deviation of the projections that write into the residual stream (`std`: of the rest).
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    mlp: Literal["gated", "plain"]
    activation: Activation
    norm: Literal["rms", "layer"]
    norm_eps: float
    positions: Rotary | Learned
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    head: Head
    window: int | None = None
    std: float = 0.02
    residual_std: float = 0.02


def _rms_norm(eps: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def _layer_norm(eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, -1, keepdims=True)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """x [..., *inputs] -> [..., *outputs]; kernel [*inputs, *outputs], bias [*outputs] or None."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        bias: bool,
        std: float,
        key: jax.Array,
        dtype: Any,
        writes: bool = False,
    ):
        """writes: whether it writes into the residual stream; else it reads from there."""
        self.writes = writes
        self.kernel = nnx.Param(_normal(key, (*inputs, *outputs), std, dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        self.num_input_axes = len(inputs)

    def split(self, parts: Parts) -> Split:
        """How the kernel is split, as a matrix."""
        return parts.split(int(self.writes), self.kernel.shape[0 if self.writes else self.num_input_axes])

    def __call__(self, x: jax.Array, parts: Parts | None) -> jax.Array:
        (y,) = together(x, parts, self)
        return y


def together(x: jax.Array, parts: Parts | None, *layers: Linear) -> list[jax.Array]:
    """What each of the layers makes of the same x, which is kept once for the backward pass.

    parts: how kernels are split, see `Decoder.hidden`.
    """
    splits = None if parts is None else [layer.split(parts) for layer in layers]
    ys = linears(x, [layer.kernel[...] for layer in layers], layers[0].num_input_axes, splits)
    biases = [layer.bias for layer in layers]
    return [y if bias is None else y + bias[...].astype(x.dtype) for y, bias in zip(ys, biases, strict=True)]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    def __init__(self, size: int, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return recomputed(partial(_rms_norm, self.eps))(x, self.scale[...])


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias over the last axis, in float32."""

    def __init__(self, size: int, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return recomputed(partial(_layer_norm, self.eps))(x, self.scale[...], self.bias[...])


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class Shared(NamedTuple):
    """What all layers of a forward pass have in common.

    rotate: queries or keys by their positions. attend, parts: see `Decoder.hidden`.
    """

    rotate: Callable[[jax.Array], jax.Array]
    attend: CachedAttend
    parts: Parts | None


class Attention(nnx.Module):
    """Queries, keys and values of a layer, and the projection of what `attend` makes of them."""

    def __init__(self, config: DecoderConfig, key: jax.Array, dtype: Any):
        D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        q_key, k_key, v_key, out_key = jax.random.split(key, 4)
        self.query = Linear((D,), (N, H), config.qkv_bias, config.std, q_key, dtype)
        self.key = Linear((D,), (K, H), config.qkv_bias, config.std, k_key, dtype)
        self.value = Linear((D,), (K, H), config.qkv_bias, config.std, v_key, dtype)
        self.out = Linear((N, H), (D,), config.out_bias, config.residual_std, out_key, dtype, writes=True)
        self.query_norm = RMSNorm(H, config.norm_eps, dtype) if config.qk_norm else None
        self.key_norm = RMSNorm(H, config.norm_eps, dtype) if config.qk_norm else None

    def __call__(self, x_RTD: jax.Array, shared: Shared, cache: Any) -> tuple[jax.Array, Any]:
        q_RTNH, k_RTKH, v_RTKH = together(x_RTD, shared.parts, self.query, self.key, self.value)
        if self.query_norm is not None and self.key_norm is not None:
            q_RTNH, k_RTKH = self.query_norm(q_RTNH), self.key_norm(k_RTKH)
        q_RTNH, k_RTKH, v_RTKH = (
            named_anywhere(x, "qkv") for x in (shared.rotate(q_RTNH), shared.rotate(k_RTKH), v_RTKH)
        )
        out_RTNH, cache = shared.attend(q_RTNH, k_RTKH, v_RTKH, cache)
        return self.out(out_RTNH, shared.parts), cache


def _gated(activation: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array) -> jax.Array:
    return (activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _activated(activation: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return activation(x.astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)); what lies between the products is computed in float32 and rounded once."""

    def __init__(self, config: DecoderConfig, key: jax.Array, dtype: Any):
        D, F = config.width, config.mlp_width
        gate_key, up_key, down_key = jax.random.split(key, 3)
        self.gate = Linear((D,), (F,), config.mlp_bias, config.std, gate_key, dtype)
        self.up = Linear((D,), (F,), config.mlp_bias, config.std, up_key, dtype)
        self.down = Linear((F,), (D,), config.mlp_bias, config.residual_std, down_key, dtype, writes=True)
        self.activation: Activation = config.activation

    def __call__(self, x_RTD: jax.Array, parts: Parts | None) -> jax.Array:
        gate_RTF, up_RTF = together(x_RTD, parts, self.gate, self.up)
        return self.down(recomputed(partial(_gated, ACTIVATIONS[self.activation]))(gate_RTF, up_RTF), parts)


class PlainMLP(nnx.Module):
    """down(activation(up(x))); the activation is computed in float32."""

    def __init__(self, config: DecoderConfig, key: jax.Array, dtype: Any):
        D, F = config.width, config.mlp_width
        up_key, down_key = jax.random.split(key)
        self.up = Linear((D,), (F,), config.mlp_bias, config.std, up_key, dtype)
        self.down = Linear((F,), (D,), config.mlp_bias, config.residual_std, down_key, dtype, writes=True)
        self.activation: Activation = config.activation

    def __call__(self, x_RTD: jax.Array, parts: Parts | None) -> jax.Array:
        return self.down(recomputed(partial(_activated, ACTIVATIONS[self.activation]))(self.up(x_RTD, parts)), parts)


MLPS = {"gated": GatedMLP, "plain": PlainMLP}


class Block(nnx.Module):
    """A layer: attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: DecoderConfig, key: jax.Array, dtype: Any):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = NORMS[config.norm](config.width, config.norm_eps, dtype)
        self.attention = Attention(config, attention_key, dtype)
        self.mlp_norm = NORMS[config.norm](config.width, config.norm_eps, dtype)
        self.mlp = MLPS[config.mlp](config, mlp_key, dtype)

    def __call__(self, x_RTD: jax.Array, shared: Shared, cache: Any) -> tuple[jax.Array, Any]:
        attended_RTD, cache = self.attention(self.attention_norm(x_RTD), shared, cache)
        x_RTD = x_RTD + attended_RTD
        return x_RTD + self.mlp(self.mlp_norm(x_RTD), shared.parts), cache


class Decoder(nnx.Module):
    """The model, a pytree under `jax.jit`, `jax.grad` and `jax.tree`; every leaf of `blocks` leads with L.

    A new one is drawn at random: normal matrices and embeddings, unit norms, zero biases.
    """

    def __init__(self, config: DecoderConfig, key: jax.Array, dtype: Any):
        V, D = config.vocab_size, config.width
        embedding_key, position_key, head_key, blocks_key = jax.random.split(key, 4)
        self.config = config
        self.embedding = nnx.Param(_normal(embedding_key, (V, D), config.std, dtype))
        P = config.positions.max_positions if isinstance(config.positions, Learned) else None
        self.position_embedding = None if P is None else nnx.Param(_normal(position_key, (P, D), config.std, dtype))
        self.blocks = jax.vmap(lambda k: Block(config, k, dtype))(jax.random.split(blocks_key, config.num_layers))
        self.final_norm = NORMS[config.norm](D, config.norm_eps, dtype)
        self.head = nnx.Param(_normal(head_key, (V, D), config.std, dtype)) if config.head == "own" else None
        self.score = nnx.Param(new_score(config, head_key).astype(dtype)) if config.head == "score" else None

    def hidden(
        self,
        tokens_RT: jax.Array,
        positions_RT: jax.Array,
        attend: Attend,
        *,
        compute_dtype: Any = jnp.float32,
        remat: Remat = "none",
        unroll: int = 1,
        parts: Parts | None = None,
    ) -> tuple[jax.Array, None]:
        """Hidden states [R, T, D] in `compute_dtype`, after the final norm.

        attend: (q [R, T, N, H], k [R, T, K, H], v [R, T, K, H]) -> [R, T, N, H]; q and k are rotated already.
        remat: what the backward pass computes again: nothing; all of a layer but its input (`full`), but what goes
        into the attention and comes out of it (`attention`), or but that and products (`dots`); `offload` is as
        `attention`, with what is kept in the host's memory. unroll: layers that the compiler sees at once. parts: how
        the blocks' kernels are split, if they are; they are gathered product by product.
        """

        def attend_uncached(q: jax.Array, k: jax.Array, v: jax.Array, cache: None) -> tuple[jax.Array, None]:
            return attend(q, k, v), cache

        return self.hidden_with_cache(
            tokens_RT,
            positions_RT,
            attend_uncached,
            None,
            compute_dtype=compute_dtype,
            remat=remat,
            unroll=unroll,
            parts=parts,
        )

    def hidden_with_cache(
        self,
        tokens_RT: jax.Array,
        positions_RT: jax.Array,
        attend: CachedAttend,
        cache: Any,
        *,
        compute_dtype: Any = jnp.float32,
        remat: Remat = "none",
        unroll: int = 1,
        parts: Parts | None = None,
    ) -> tuple[jax.Array, Any]:
        """As `hidden`, with a cache: a pytree of leaves [L, ...].

        attend: (q, k, v, the layer's cache) -> (out, the layer's new cache).
        """
        x_RTD = self.embedding[...][tokens_RT].astype(compute_dtype)
        if self.position_embedding is not None:
            x_RTD = x_RTD + self.position_embedding[...][positions_RT].astype(compute_dtype)
        shared = Shared(_rotation(self.config, positions_RT), attend, parts)

        def layer(x: jax.Array, block_and_cache: tuple[Block, Any]) -> tuple[jax.Array, Any]:
            block, layer_cache = block_and_cache
            return block(named_anywhere(x, "input"), shared, layer_cache)

        x_RTD, cache = jax.lax.scan(_rematerialised(layer, remat), x_RTD, (self.blocks, cache), unroll=unroll)
        return self.final_norm(x_RTD), cache

    def head_matrix(self) -> jax.Array:
        """The matrix [V, D] of a language-model head, the embedding if tied. ValueError for a score head."""
        if self.config.head == "score":
            raise ValueError("a decoder with a score head gives rewards, no logits")
        return (self.embedding if self.head is None else self.head)[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden states [..., D]."""
        matrix_VD = self.head_matrix().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, matrix_VD, preferred_element_type=jnp.float32)

    def rewards(self, hidden: jax.Array) -> jax.Array:
        """Float32 rewards [...] of hidden states [..., D], by the score head. ValueError for a language-model head.

        The head keeps its own precision: D numbers cost nothing, and a matrix product would round them on some devices.
        """
        if self.score is None:
            raise ValueError("a decoder with a language-model head gives logits, no rewards")
        return jnp.sum(hidden.astype(jnp.float32) * self.score[...][0].astype(jnp.float32), axis=-1)


LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "position_embedding": (None, "embed"),
    "blocks.attention_norm.scale": ("layers", None),
    "blocks.attention_norm.bias": ("layers", None),
    "blocks.attention.query.kernel": ("layers", "embed", "heads", None),
    "blocks.attention.query.bias": ("layers", "heads", None),
    "blocks.attention.key.kernel": ("layers", "embed", "kv_heads", None),
    "blocks.attention.key.bias": ("layers", "kv_heads", None),
    "blocks.attention.value.kernel": ("layers", "embed", "kv_heads", None),
    "blocks.attention.value.bias": ("layers", "kv_heads", None),
    "blocks.attention.query_norm.scale": ("layers", None),
    "blocks.attention.key_norm.scale": ("layers", None),
    "blocks.attention.out.kernel": ("layers", "heads", None, "embed"),
    "blocks.attention.out.bias": ("layers", None),
    "blocks.mlp_norm.scale": ("layers", None),
    "blocks.mlp_norm.bias": ("layers", None),
    "blocks.mlp.gate.kernel": ("layers", "embed", "mlp"),
    "blocks.mlp.gate.bias": ("layers", "mlp"),
    "blocks.mlp.up.kernel": ("layers", "embed", "mlp"),
    "blocks.mlp.up.bias": ("layers", "mlp"),
    "blocks.mlp.down.kernel": ("layers", "mlp", "embed"),
    "blocks.mlp.down.bias": ("layers", None),
    "final_norm.scale": (None,),
    "final_norm.bias": (None,),
    "head": ("vocab", "embed"),
    "score": (None, "embed"),
}


def new_score(config: DecoderConfig, key: jax.Array) -> jax.Array:
    """The matrix of a new score head, float32 [1, D]."""
    return _normal(key, (1, config.width), config.std, jnp.float32)


def abstract_decoder(config: DecoderConfig, dtype: Any) -> Decoder:
    """The decoder with `jax.ShapeDtypeStruct` for arrays."""
    return jax.eval_shape(lambda: Decoder(config, jax.random.key(0), dtype))


def map_params(function: Callable[[str, Any], Any], decoder: Decoder) -> Decoder:
    """The decoder with `function(path, leaf)` in place of every leaf; paths read `blocks.attention.query.kernel`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(param_path(path), leaf), decoder)


def by_path(decoder: Decoder) -> dict[str, Any]:
    """The decoder's leaves by their paths."""
    leaves: dict[str, Any] = {}
    map_params(leaves.setdefault, decoder)
    return leaves


def param_path(path: tuple[Any, ...]) -> str:
    """`blocks.attention.query.kernel` from the key path that jax.tree_util gives a leaf of a Decoder."""
    return ".".join(key.name for key in path[:-1])


def logical_axes(config: DecoderConfig) -> Decoder:
    """A Decoder with a tuple for each leaf that names its axes: layers, vocab, embed, heads, kv_heads, mlp or None.

    Tuples are pytrees themselves: pass `is_leaf=lambda x: isinstance(x, tuple)` to `jax.tree.map`.
    """
    return map_params(lambda path, _: LOGICAL_AXES[path], abstract_decoder(config, jnp.float32))


def _normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype: Any) -> jax.Array:
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return layer
        case "full":
            policy = policies.save_only_these_names("input")
        case "dots":
            policy = policies.save_only_these_names("input", PRODUCT, "qkv", "attention")
        case "attention":
            policy = policies.save_only_these_names("input", "qkv", "attention")
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=["input"],
                names_which_can_be_offloaded=["qkv", "attention"],
                offload_src="device",
                offload_dst="pinned_host",
            )
    # Forward and backward are separate loops of a scan: the compiler cannot merge them, so no barrier is needed.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def rotary_frequencies(rotary: Rotary, head_dim: int) -> np.ndarray:
    """Radians per position for each pair of a head's coordinates: float32 [H / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(rotary.theta) ** exponents).astype(np.float32)
    match rotary.scaling:
        case LinearScaling(factor):
            return (frequencies / np.float32(factor)).astype(np.float32)
        case Llama3Scaling(factor, low, high, original):
            wavelengths = 2 * np.pi / frequencies
            blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
            return ((1 - blend) * frequencies / factor + blend * frequencies).astype(np.float32)
        case None:
            return frequencies


def _rotation(config: DecoderConfig, positions_RT: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The function that turns queries or keys [R, T, heads, H] by their positions, in float32."""
    if not isinstance(config.positions, Rotary):
        return lambda x: x
    frequencies = rotary_frequencies(config.positions, config.head_dim)
    angles = positions_RT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def rotate(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)

    return rotate
