"""LLaMA and its relatives: RMSNorm, rotary positions, SwiGLU, grouped-query attention, blocks stacked by `nn.scan`.

`Architecture` describes the model. A factory passed to the model creates the linear layers of a block. This module is
independent of adapters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from switchlora_jax.models.architecture import Architecture
from switchlora_jax.models.rotary import rotary_angles, rotate, score_factor
from switchlora_jax.parallel.sharding import GATHERED

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


def causal_attention(q, k, v, angles, kernel: str = "loop"):
  """Causal softmax attention with rotary positions; scores are computed in float32 or wider.

  Args:
    q: [batch, heads, length, head_size].
    k, v: [batch, kv_heads, length, head_size]; each of their heads serves heads / kv_heads successive heads of q.
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
  k, v = _per_query_head(k, q.shape[1]), _per_query_head(v, q.shape[1])
  one_head = jax.checkpoint(lambda q, k, v: head_attention(q, k, v, angles), prevent_cse=False)
  if kernel != "loop":
    return checkpoint_name(jax.vmap(jax.vmap(one_head))(q, k, v), MIXED)
  batch, heads, length, _ = q.shape
  most = max(1, SCORES // (block_size(length) * length))
  together = max(n for n in range(1, most + 1) if batch * heads % n == 0)
  groups = tuple(x.reshape(-1, together, *x.shape[2:]) for x in (q, k, v))
  return checkpoint_name(jax.lax.map(lambda group: jax.vmap(one_head)(*group), groups).reshape(q.shape), MIXED)


def _per_query_head(x, heads: int):
  """Repeat the heads of keys or values [batch, kv_heads, length, head_size] for the `heads` heads of the queries."""
  return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


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

  epsilon: float
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide *= jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.epsilon)
    return wide.astype(self.dtype) * jnp.expand_dims(scale, range(x.ndim - 1)).astype(self.dtype)


class Bias(nn.Module):
  """x + bias over the last axis; zeros at first."""

  param_dtype: Any

  @nn.compact
  def __call__(self, x):
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
    return x + jnp.expand_dims(bias, range(x.ndim - 1)).astype(x.dtype)


class Block(nn.Module):
  """A pre-norm transformer block: attention and MLP with residual connections, x [batch, length, hidden]."""

  architecture: Architecture
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
    return RMSNorm(self.architecture.norm_eps, self.dtype, self.param_dtype, name=name)

  def _linear(self, name, features, x):
    # As [tokens, in], because the gradient of a kernel is slower if its product sums over two axes.
    y = self.dense(features, name=name)(x.reshape(-1, x.shape[-1]))
    return checkpoint_name(y.reshape(*x.shape[:-1], features), LINEAR)

  def attention(self, x, angles):
    """Causal self-attention of x [batch, length, hidden], including the positions in a cache."""
    model = self.architecture
    q = self._heads("q", model.num_heads, x)
    k, v = (self._heads(name, model.num_kv_heads, x) for name in "kv")
    if model.qk_norm:
      q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
    if (factor := score_factor(model.rope)) != 1:
      q = q * factor
    if self.cache_length:
      mixed = self.cached_attention(q, k, v, angles)
    else:
      mixed = causal_attention(q, k, v, angles, self.attention_kernel)
    return self._linear("o", x.shape[-1], mixed.swapaxes(1, 2).reshape(*x.shape[:-1], -1))

  def _heads(self, name, heads, x):
    """The projection `name` of x [batch, length, hidden], [batch, heads, length, head_dim]."""
    y = self._linear(name, heads * self.architecture.head_dim, x)
    if self.architecture.qkv_bias:
      y = Bias(self.param_dtype, name=f"{name}_bias")(y)
    return y.reshape(*x.shape[:-1], heads, -1).swapaxes(1, 2)

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
    keys, values = (_per_query_head(x.value, q.shape[1]) for x in (keys, values))
    return attention(rotate(q, angles), keys, values, seen)

  def mlp(self, x):
    """SwiGLU, x [batch, length, hidden]."""
    gate, up = (self._linear(name, self.architecture.intermediate_size, x) for name in ("gate", "up"))
    return self._linear("down", x.shape[-1], nn.silu(gate) * up)


def head_kernel(params):
  """The matrix from hidden states to logits, [hidden, vocab]: the head's kernel, or the transposed embedding."""
  return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T


class LLaMA(nn.Module):
  """A decoder: from token ids [batch, length] to logits [batch, length, vocab_size] in `dtype`.

  Attributes:
    architecture: sizes and variants.
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

  architecture: Architecture
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
    model, kinds = self.architecture, dict(dtype=self.dtype, param_dtype=self.param_dtype)
    # Look up in param_dtype, then cast: the gradient of a frequent token sums hundreds of terms, too many for bfloat16.
    stored = dict(dtype=self.param_dtype, param_dtype=self.param_dtype)
    embed = nn.Embed(model.vocab_size, model.hidden_size, embedding_init=INIT, **stored, name="embed")
    x = embed(tokens).astype(self.dtype)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    positions = self.cache_length or tokens.shape[1]
    angles = rotary_angles(model.rope, positions, model.head_dim, model.max_position, wide)
    blocks = nn.scan(
      self.block(),
      variable_axes={"params": 0, "frozen": 0, "candidates": 0, "cache": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=model.num_layers,
    )
    x, _ = blocks(model, self.dense, self.attention_kernel, self.cache_length, **kinds, name="blocks")(x, angles)
    x = RMSNorm(model.norm_eps, **kinds, name="norm")(x)
    if not self.head:
      return x
    if model.tied_embeddings:
      return jnp.matmul(x, embed.embedding.T.astype(self.dtype))
    return nn.Dense(model.vocab_size, use_bias=False, kernel_init=INIT, **kinds, name="head")(x)

  def block(self):
    """`block_class` with the gathering of `gather` and the recomputation of `remat`."""
    if self.gather is None:
      return REMAT[self.remat](self.block_class)
    block = nn.map_variables(self.block_class, ("params", "frozen"), trans_in_fn=self.gather)
    # Gathered parameters are not saved but gathered again: those of all layers would add up to the whole model.
    if self.remat == "none":
      return nn.remat(block, prevent_cse=False, policy=all_but_gathered)
    return REMAT[self.remat](block)
