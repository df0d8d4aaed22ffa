"""LLaMA: RMSNorm, rotary positions, SwiGLU, no biases, untied head, blocks stacked by `nn.scan`.

A factory passed to the model creates the linear layers of a block. This module is independent of adapters.
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
BLOCK, BLOCKS = 64, 4  # smallest number of queries in a block of attention, and largest number of blocks
SCORES = 2**20  # scores that the kernel `loop` computes at a time: 4 MiB in float32, for the caches of a CPU
LINEAR, MIXED = "linear", "mixed"  # checkpoint names of the outputs of a block's linear layers, and of its attention


def save_products(primitive, *_, **params) -> bool:
  """Remat policy: save the outputs of linear layers and of attention; cuDNN's with what its backward pass needs.

  Norms, elementwise functions and the scores of attention are computed again. That takes less time than to write and
  read them.
  """
  return params.get("name") in (LINEAR, MIXED) or primitive.name.startswith("dot_product_attention_fwd")


def all_but_gathered(primitive, *_, **params) -> bool:
  """Remat policy: save everything except all-gathered parameters and their casts.

  `save_anything_except_these_names` does not suffice: it saves the result of the all-gather before it gets its name.
  """
  return primitive.name not in ("all_gather", "convert_element_type") and params.get("name") != GATHERED


REMAT = {
  "none": partial(nn.remat, prevent_cse=False, policy=save_products),
  "linear": partial(nn.remat, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(LINEAR)),
  "full": partial(nn.remat, prevent_cse=False),
}


def rotary_angles(length: int, head_size: int, dtype=jnp.float32):
  """Rotary angles [length, head_size / 2] of positions 0 to length - 1."""
  frequency = ROPE_BASE ** (-jnp.arange(0, head_size, 2, dtype=dtype) / head_size)
  return jnp.outer(jnp.arange(length, dtype=dtype), frequency)


def rotate(x, angles):
  """Rotate the two halves of each head by the angles of its position; x [..., length, head_size]."""
  cos, sin = (jnp.expand_dims(f(angles), range(x.ndim - 2)).astype(x.dtype) for f in (jnp.cos, jnp.sin))
  first, second = jnp.split(x, 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def causal_attention(q, k, v, angles, kernel: str = "loop"):
  """Causal softmax attention with rotary positions; scores are computed in float32 or wider.

  Args:
    q, k, v: [batch, heads, length, head_size].
    angles: of the positions, [length, head_size / 2].
    kernel: one of three. `cudnn`: cuDNN's, which needs an NVIDIA GPU, or `batched` where it does not support the
      arguments. `batched`: `head_attention` of all heads at once. `loop`: the same of a few heads at a time, which
      keeps the scores in the caches of a CPU.
  Returns:
    [batch, heads, length, head_size].
  """
  if kernel == "cudnn" and supports_fused(q.dtype, *q.shape[2:]):
    q, k, v = (x.swapaxes(1, 2) for x in (rotate(q, angles), rotate(k, angles), v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn").swapaxes(1, 2)
  one_head = jax.checkpoint(lambda q, k, v: head_attention(q, k, v, angles), prevent_cse=False)
  if kernel != "loop":
    return checkpoint_name(jax.vmap(jax.vmap(one_head))(q, k, v), MIXED)
  batch, heads, length, _ = q.shape
  most = max(1, SCORES // (block_size(length) * length))
  together = max(n for n in range(1, most + 1) if batch * heads % n == 0)
  groups = tuple(x.reshape(-1, together, *x.shape[2:]) for x in (q, k, v))
  return checkpoint_name(jax.lax.map(lambda group: jax.vmap(one_head)(*group), groups).reshape(q.shape), MIXED)


def head_attention(q, k, v, angles):
  """Causal attention of one head with rotary positions; q, k, v and the result are [length, head_size].

  The queries are divided into blocks. A block is multiplied only with the keys up to its own end, which saves 3/8
  of the products of four blocks. More blocks would save little more, and take longer to compile.
  """
  q, k = rotate(q, angles), rotate(k, angles)
  size, positions, mixed = block_size(len(q)), jnp.arange(len(q)), []
  for start in range(0, len(q), size):
    block, until = slice(start, start + size), slice(0, start + size)
    mixed.append(attention(q[block], k[until], v[until], positions[None, until] <= positions[block, None]))
  return jnp.concatenate(mixed)


def block_size(length: int) -> int:
  """Number of queries in a block of `head_attention`."""
  return max(BLOCK, -(-length // BLOCKS))


def attention(q, k, v, seen):
  """Softmax attention of q [..., queries, head_size] to the keys in the mask `seen` [queries, keys]."""
  # `jax.nn.dot_product_attention` computes its softmax in float32 even for float64 inputs.
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.matmul(q, k.mT, preferred_element_type=wide) * q.shape[-1] ** -0.5
  seen = jnp.expand_dims(seen, range(scores.ndim - 2))
  weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(wide).min), -1).astype(q.dtype)
  return jnp.matmul(weights, v)


def supports_fused(dtype, length: int, head_size: int) -> bool:
  """Whether cuDNN's attention supports the shapes: 16 bits, an even length, a head size of 8, 16, …, 128."""
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
  """A pre-norm transformer block: attention and MLP with residual connections, x [batch, length, hidden]."""

  num_heads: int
  intermediate_size: int
  dense: Callable[..., nn.Module]
  attention_kernel: str
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
    # As [tokens, in], because the gradient of a kernel is slower if its product sums over two axes.
    y = self.dense(features, name=name)(x.reshape(-1, x.shape[-1]))
    return checkpoint_name(y.reshape(*x.shape[:-1], features), LINEAR)

  def attention(self, x, angles):
    """Causal self-attention of x [batch, length, hidden], including the positions in a cache."""
    heads = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)
    q, k, v = (self._linear(name, x.shape[-1], x).reshape(heads).swapaxes(1, 2) for name in "qkv")
    if self.cache_length:
      mixed = self.cached_attention(q, k, v, angles)
    else:
      mixed = causal_attention(q, k, v, angles, self.attention_kernel)
    return self._linear("o", x.shape[-1], mixed.swapaxes(1, 2).reshape(x.shape))

  def cached_attention(self, q, k, v, angles):
    """Append the keys and values of new positions to the cache, and attend to all positions in it."""
    empty = lambda: jnp.zeros((*k.shape[:2], self.cache_length, k.shape[3]), k.dtype)
    keys, values = self.variable("cache", "keys", empty), self.variable("cache", "values", empty)
    filled = self.variable("cache", "filled", jnp.zeros, (), jnp.int32)
    positions = filled.value + jnp.arange(q.shape[2])
    angles = angles[positions]
    keys.value = keys.value.at[:, :, positions].set(rotate(k, angles))
    values.value = values.value.at[:, :, positions].set(v)
    filled.value += q.shape[2]
    seen = jnp.arange(self.cache_length)[None] <= positions[:, None]
    return attention(rotate(q, angles), keys.value, values.value, seen)

  def mlp(self, x):
    """SwiGLU, x [batch, length, hidden]."""
    gate = self._linear("gate", self.intermediate_size, x)
    up = self._linear("up", self.intermediate_size, x)
    return self._linear("down", x.shape[-1], nn.silu(gate) * up)


class LLaMA(nn.Module):
  """A LLaMA decoder: from token ids [batch, length] to logits [batch, length, vocab_size] in `dtype`.

  Attributes:
    dense: factory of the seven linear layers of a block, `dense(features, name=…)`.
    dtype: dtype of the computation.
    param_dtype: dtype of embedding, norms and head.
    remat: activations of a block that are saved for the backward pass; the others are recomputed. `none`: the outputs
      of linear layers and attention, or with `gather` everything but the gathered arrays; `linear`: those of the linear
      layers; `full`: only the input of the block.
    attention_kernel: see `causal_attention`.
    cache_length: number of positions of the collection `cache`, which must be mutable; 0: no cache. With a cache, a
      call continues after the positions of the previous call, which are not computed again.
    head: if false, return the hidden states before the head, [batch, length, hidden_size].
    gather: maps the sharded variables of one layer, {collection: tree}, to whole arrays. None: they are not sharded.
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
  attention_kernel: str = "loop"
  cache_length: int = 0
  head: bool = True
  gather: Callable[[dict], dict] | None = None
  block_class = Block  # not annotated, so not a dataclass field; a subclass may override it

  @nn.compact
  def __call__(self, tokens):
    kinds = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    # Look up in param_dtype, then cast: the gradient of a frequent token sums hundreds of terms, too many for bfloat16.
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
    sizes, attention = (self.num_heads, self.intermediate_size), (self.attention_kernel, self.cache_length)
    x, _ = blocks(*sizes, self.dense, *attention, **kinds, name="blocks")(x, angles)
    x = RMSNorm(**kinds, name="norm")(x)
    if not self.head:
      return x
    return nn.Dense(self.vocab_size, use_bias=False, kernel_init=INIT, **kinds, name="head")(x)

  def block(self):
    """`block_class` with the gathering of `gather` and the recomputation of `remat`."""
    if self.gather is None:
      return REMAT[self.remat](self.block_class)
    block = nn.map_variables(self.block_class, ("params", "frozen"), trans_in_fn=self.gather)
    # Gathered parameters are not saved but gathered again: those of all layers would add up to the whole model.
    if self.remat == "none":
      return nn.remat(block, prevent_cse=False, policy=all_but_gathered)
    return REMAT[self.remat](block)
