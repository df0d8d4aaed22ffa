"""LLaMA: RMSNorm, rotary positions, SwiGLU, no biases, untied head, blocks stacked by `nn.scan`.

Each linear layer of a block is made by the factory the model is handed; nothing here knows of adapters.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from switchlora_jax.sharding import GATHERED

EPSILON = 1e-6  # of RMSNorm
ROPE_BASE = 10_000.0
INIT = nn.initializers.normal(0.02)


def rotary_angles(length: int, head_size: int, dtype=jnp.float32):
  """Angles [length, head_size / 2] of the rotary positions 0 … length - 1."""
  frequency = ROPE_BASE ** (-jnp.arange(0, head_size, 2, dtype=dtype) / head_size)
  return jnp.outer(jnp.arange(length, dtype=dtype), frequency)


def rotate(x, angles):
  """Rotate the two halves of every head by its position's angles; x [batch, length, heads, head_size]."""
  cos, sin = (f(angles)[:, None, :].astype(x.dtype)[None] for f in (jnp.cos, jnp.sin))
  first, second = jnp.split(x, 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def causal_attention(q, k, v):
  """Softmax attention to the past; all [batch, length, heads, head_size]. Scores in float32 or wider.

  Not `jax.nn.dot_product_attention`, whose softmax is float32 even where the model is float64.
  """
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
  past = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
  weights = jax.nn.softmax(jnp.where(past, scores, jnp.finfo(wide).min), -1).astype(q.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


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
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x, angles):
    x = x + self.attention(self._norm("attention_norm")(x), angles)
    x = x + self.mlp(self._norm("mlp_norm")(x))
    return x, None

  def _norm(self, name):
    return RMSNorm(self.dtype, self.param_dtype, name=name)

  def attention(self, x, angles):
    heads = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)
    q, k, v = (self.dense(x.shape[-1], name=name)(x).reshape(heads) for name in "qkv")
    mixed = causal_attention(rotate(q, angles), rotate(k, angles), v)
    return self.dense(x.shape[-1], name="o")(mixed.reshape(x.shape))

  def mlp(self, x):
    gate = self.dense(self.intermediate_size, name="gate")(x)
    up = self.dense(self.intermediate_size, name="up")(x)
    return self.dense(x.shape[-1], name="down")(nn.silu(gate) * up)


class LLaMA(nn.Module):
  """Token ids [batch, length] to logits [batch, length, vocab_size] in `dtype`.

  Attributes:
    dense: makes the seven linear layers of a block: `dense(features, name=…)`.
    dtype: of the computation; `param_dtype`: of embedding, norms and head.
    remat: recompute each block's activations in the backward pass instead of keeping them.
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
  remat: bool = False
  gather: Callable[[dict], dict] | None = None

  @nn.compact
  def __call__(self, tokens):
    kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x = nn.Embed(self.vocab_size, self.hidden_size, embedding_init=INIT, **kinds, name="embed")(tokens)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    angles = rotary_angles(tokens.shape[1], self.hidden_size // self.num_heads, wide)
    blocks = nn.scan(
      self.block(),
      variable_axes={"params": 0, "frozen": 0, "candidates": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.num_layers,
    )
    x, _ = blocks(self.num_heads, self.intermediate_size, self.dense, **kinds, name="blocks")(x, angles)
    x = RMSNorm(**kinds, name="norm")(x)
    return nn.Dense(self.vocab_size, use_bias=False, kernel_init=INIT, **kinds, name="head")(x)

  def block(self):
    """`Block`, gathering its variables and recomputing as the attributes say."""
    gathering = Block if self.gather is None else nn.map_variables(Block, ("params", "frozen"), trans_in_fn=self.gather)
    if self.remat:
      return nn.remat(gathering, prevent_cse=False)
    if self.gather is None:
      return Block
    # Kept for the backward pass, what is gathered would pile up to the whole model; it is gathered again.
    policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    return nn.remat(gathering, prevent_cse=False, policy=policy)
