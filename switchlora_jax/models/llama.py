"""LLaMA: RMSNorm, rotary positions, SwiGLU, no biases, untied head, blocks stacked by `nn.scan`.

Each linear layer of a block is made by the factory the model is handed; nothing here knows of adapters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from switchlora_jax.parallel.sharding import GATHERED

EPSILON = 1e-6  # of RMSNorm
ROPE_BASE = 10_000.0
INIT = nn.initializers.normal(0.02)
LINEAR = "linear"  # by this name the policies of `REMAT` know the outputs of a block's linear layers
REMAT = {
  "none": lambda block: block,
  "linear": partial(nn.remat, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(LINEAR)),
  "full": partial(nn.remat, prevent_cse=False),
}


def all_but_gathered(primitive, *_, **params) -> bool:
  """A policy that keeps everything but what is gathered, and its casts; by their names alone JAX cannot deny them."""
  return primitive.name not in ("all_gather", "convert_element_type") and params.get("name") != GATHERED


def rotary_angles(length: int, head_size: int, dtype=jnp.float32):
  """Angles [length, head_size / 2] of the rotary positions 0 … length - 1."""
  frequency = ROPE_BASE ** (-jnp.arange(0, head_size, 2, dtype=dtype) / head_size)
  return jnp.outer(jnp.arange(length, dtype=dtype), frequency)


def rotate(x, angles):
  """Rotate the two halves of every head by its position's angles; x [batch, length, heads, head_size]."""
  cos, sin = (f(angles)[:, None, :].astype(x.dtype)[None] for f in (jnp.cos, jnp.sin))
  first, second = jnp.split(x, 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def causal_attention(q, k, v, fused: bool = False):
  """Softmax attention to the past; all [batch, length, heads, head_size]. Scores in float32 or wider.

  Args:
    fused: by cuDNN's kernel, which holds no [length, length] array, where it takes them. Needs an NVIDIA GPU.
  """
  if fused and takes_fused(q.dtype, q.shape[1], q.shape[-1]):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
  return attention(q, k, v, jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool)))


def attention(q, k, v, seen):
  """Softmax attention of q [batch, queries, heads, head_size] to those of k and v that `seen` [queries, keys] marks."""
  # Not JAX's own: its softmax is float32 even where the model is float64.
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
  weights = jax.nn.softmax(jnp.where(seen[None, None], scores, jnp.finfo(wide).min), -1).astype(q.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def takes_fused(dtype, length: int, head_size: int) -> bool:
  """Whether cuDNN's attention takes them: 16 bits, an even length, heads of a multiple of 8 up to 128."""
  return dtype in (jnp.bfloat16, jnp.float16) and length % 2 == 0 and head_size % 8 == 0 and head_size <= 128


class RMSNorm(nn.Module):
  """x / √(mean(x²) + ε) · scale over the last axis, computed in float32 or wider."""

  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide *= jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + EPSILON)
    return wide.astype(self.dtype) * jnp.expand_dims(scale, range(x.ndim - 1)).astype(self.dtype)


class Block(nn.Module):
  """Attention and MLP, each behind a norm and added to its input [batch, length, hidden]."""

  num_heads: int
  intermediate_size: int
  dense: Callable[..., nn.Module]
  fused_attention: bool
  cache_length: int
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x, angles):
    x = x + self.attention(self._norm("attention_norm")(x), angles)
    x = x + self.mlp(self._norm("mlp_norm")(x))
    return x, None

  def _norm(self, name):
    return RMSNorm(self.dtype, self.param_dtype, name=name)

  def _linear(self, name, features, x):
    return checkpoint_name(self.dense(features, name=name)(x), LINEAR)

  def attention(self, x, angles):
    """What each position of x [batch, length, hidden] takes from itself and the past, those in a cache included."""
    heads = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)
    q, k, v = (self._linear(name, x.shape[-1], x).reshape(heads) for name in "qkv")
    if self.cache_length:
      mixed = self.cached_attention(q, k, v, angles)
    else:
      mixed = causal_attention(rotate(q, angles), rotate(k, angles), v, self.fused_attention)
    return self._linear("o", x.shape[-1], mixed.reshape(x.shape))

  def cached_attention(self, q, k, v, angles):
    """Attention of new positions to themselves and to those in the cache, which they join."""
    empty = lambda: jnp.zeros((len(k), self.cache_length, *k.shape[2:]), k.dtype)
    keys, values = self.variable("cache", "keys", empty), self.variable("cache", "values", empty)
    filled = self.variable("cache", "filled", jnp.zeros, (), jnp.int32)
    positions = filled.value + jnp.arange(q.shape[1])
    angles = angles[positions]
    keys.value = keys.value.at[:, positions].set(rotate(k, angles))
    values.value = values.value.at[:, positions].set(v)
    filled.value += q.shape[1]
    seen = jnp.arange(self.cache_length)[None] <= positions[:, None]
    return attention(rotate(q, angles), keys.value, values.value, seen)

  def mlp(self, x):
    gate = self._linear("gate", self.intermediate_size, x)
    up = self._linear("up", self.intermediate_size, x)
    return self._linear("down", x.shape[-1], nn.silu(gate) * up)


class LLaMA(nn.Module):
  """Token ids [batch, length] to logits [batch, length, vocab_size] in `dtype`; without a head, to its inputs.

  Attributes:
    dense: makes the seven linear layers of a block: `dense(features, name=…)`.
    dtype: of the computation; `param_dtype`: of embedding, norms and head.
    remat: what of a block's activations is kept for the backward pass, the rest being recomputed: `none` keeps
      them all, `linear` the outputs of the linear layers, `full` the block's input alone.
    fused_attention: see `causal_attention`.
    cache_length: positions for which the collection `cache`, to be mutable, has room; 0: there is none. What a call
      with a cache is given goes on where the call before it ended, and need not be run again.
    head: whether to end in logits, or in the hidden states [batch, length, hidden_size] that the head takes.
    gather: from the variables of one layer as they lie, {collection: tree}, to whole arrays; None: they are whole.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  dense: Callable[..., nn.Module]
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str = "none"
  fused_attention: bool = False
  cache_length: int = 0
  head: bool = True
  gather: Callable[[dict], dict] | None = None

  @nn.compact
  def __call__(self, tokens):
    kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    # Looked up wide and narrowed after: the gradient of a frequent token sums hundreds, too many for bfloat16.
    stored = dict(dtype=self.param_dtype, param_dtype=self.param_dtype)
    embed = nn.Embed(self.vocab_size, self.hidden_size, embedding_init=INIT, **stored, name="embed")
    x = embed(tokens).astype(self.dtype)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    angles = rotary_angles(self.cache_length or tokens.shape[1], self.hidden_size // self.num_heads, wide)
    blocks = nn.scan(
      self.block(),
      variable_axes={"params": 0, "frozen": 0, "candidates": 0, "cache": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.num_layers,
    )
    sizes, attention = (self.num_heads, self.intermediate_size), (self.fused_attention, self.cache_length)
    x, _ = blocks(*sizes, self.dense, *attention, **kinds, name="blocks")(x, angles)
    x = RMSNorm(**kinds, name="norm")(x)
    if not self.head:
      return x
    return nn.Dense(self.vocab_size, use_bias=False, kernel_init=INIT, **kinds, name="head")(x)

  def block(self):
    """`Block`, gathering its variables and recomputing as the attributes say."""
    if self.gather is None:
      return REMAT[self.remat](Block)
    block = nn.map_variables(Block, ("params", "frozen"), trans_in_fn=self.gather)
    # Kept for the backward pass, what is gathered would pile up to the whole model; it is gathered again.
    if self.remat == "none":
      return nn.remat(block, prevent_cse=False, policy=all_but_gathered)
    return REMAT[self.remat](block)
