"""Adam with a step count per LoRA vector and the reset and freeze masks of the switch; gradient clipping.

Resetting and freezing follow SwitchLoRA (arXiv 2406.06564, Algorithm 1 and Appendices A and D). This module is
independent of models and configs: the caller marks the leaves whose rows are LoRA vectors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class VectorAdamState(NamedTuple):
  """State of `scale_by_vector_adam`.

  Attributes:
    count: int32 number of updates since the last reset: [..., r, 1] if the rows of a leaf are LoRA vectors, else [].
    mu, nu: first and second moments, of the shapes of the parameters.
  """

  count: Any
  mu: Any
  nu: Any


def _no_vectors(params):
  return jax.tree.map(lambda _: False, params)


def scale_by_vector_adam(
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  vectors: Callable = _no_vectors,
  count_per_element: bool = False,
  moments_dtype=None,
) -> optax.GradientTransformationExtraArgs:
  """Adam with a step count per LoRA vector, so that each vector can be reset independently.

  `update` also accepts two masks, trees of bools like the parameters whose leaves broadcast against them:
    reset: where true, mu, nu and count are set to 0 before this update (Algorithm 1, line 3; App. A).
    freeze: where true, the gradient is 0. The count advances, so that the first update after N frozen steps has the
      size (1-β1)/(1-β1^(N+1)) / √((1-β2)/(1-β2^(N+1))), 0.522 for N = 5, and the following ones warm up to 1.
  Without masks, each leaf is updated exactly (bitwise) as by an `optax.scale_by_adam` of its own.

  Args:
    b1, b2: decay rates of the first and second moments.
    eps: added to the square root of the bias-corrected second moment.
    vectors: from the parameters to a tree of bools, true for the leaves [..., r, d] whose rows are LoRA vectors.
    count_per_element: store a count per element of every leaf (App. D). The updates are the same; the state of the
      optimizer takes 50% more memory.
    moments_dtype: dtype of the stored moments, which are updated in the wider of it and the gradient's; None: that of
      the parameters.
  Raises:
    ValueError: in `update`, if a reset mask does not broadcast to the step count of its leaf.
    TypeError: in `update`, if it is called with `skip`, an argument of earlier versions. Other unknown arguments are
      ignored, as `optax.chain` requires.
  """

  def count_shape(is_vector, param):
    if count_per_element:
      return param.shape
    return (*param.shape[:-1], 1) if is_vector else ()

  def init(params):
    count = jax.tree.map(lambda v, p: jnp.zeros(count_shape(v, p), jnp.int32), vectors(params), params)
    zeros = lambda: optax.tree.zeros_like(params, dtype=moments_dtype)
    return VectorAdamState(count, zeros(), zeros())

  def update(updates, state, params=None, *, reset=None, freeze=None, **others):
    del params
    if "skip" in others:
      raise TypeError(
        "update() no longer has an argument skip; to skip a step, keep the old parameters and the old optimizer state, "
        "for example with jnp.where(skip, old, new)"
      )
    reset = _no_vectors(updates) if reset is None else reset
    freeze = _no_vectors(updates) if freeze is None else freeze
    grads = jax.tree.map(lambda g, frozen: jnp.where(frozen, 0, g), updates, freeze)
    fresh = jax.tree.map(lambda s: jax.tree.map(lambda x, hit: jnp.where(hit, 0, x), s, reset), state, is_leaf=_is_tree)
    if jax.tree.map(jnp.shape, fresh) != jax.tree.map(jnp.shape, state):
      raise ValueError(
        "a reset mask must broadcast to the step count of its leaf, but does not; pass vectors=…, a function that "
        "marks the leaves whose rows are LoRA vectors (switchlora_jax.lora_vectors for the layers of this package)"
      )
    count = jax.tree.map(optax.safe_increment, fresh.count)
    mu = optax.tree.update_moment(grads, fresh.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, fresh.nu, b2, 2)
    direction = jax.tree.map(lambda m, v, c: _unbias(m, b1, c) / (jnp.sqrt(_unbias(v, b2, c)) + eps), mu, nu, count)
    stored = lambda moments: optax.tree.cast(moments, moments_dtype)
    return direction, VectorAdamState(count, stored(mu), stored(nu))

  return optax.GradientTransformationExtraArgs(init, update)


def is_vector_adam(node) -> bool:
  """Whether a node of an optimizer state is a `VectorAdamState`."""
  return isinstance(node, VectorAdamState)


def find_vector_adam(opt_state) -> VectorAdamState | None:
  """The `VectorAdamState` that an optimizer state is or contains; None if there is none."""
  return next(filter(is_vector_adam, jax.tree.leaves(opt_state, is_leaf=is_vector_adam)), None)


def signal_to_noise(mu, nu, count, b1: float, b2: float):
  """‖m‖ / √Σv of each row, with bias-corrected moments.

  It is 1 for constant gradients, and about √((1-β1)/(1+β1)) for noise with mean 0, 0.23 at β1 = 0.9.

  Args:
    mu, nu, count: of one leaf of a `VectorAdamState`, [..., r, d] and a count that broadcasts to it.
  Returns:
    [..., r] in float32 or wider; NaN for rows whose gradients have all been 0 since their last reset.
  """
  mu, nu = (moment.astype(jnp.promote_types(moment.dtype, jnp.float32)) for moment in (mu, nu))
  squares = jnp.sum(jnp.square(_unbias(mu, b1, count)), -1)
  return jnp.sqrt(squares / jnp.sum(_unbias(nu, b2, count), -1))


def _is_tree(node):
  return not is_vector_adam(node)


def _unbias(moment, decay, count):
  # XLA turns a quotient with a broadcast divisor into a product. Written as a product, the result is bitwise the same
  # for counts of any shape.
  return moment * (1 / (1 - decay**count)).astype(moment.dtype)


def vector_adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8, **options) -> optax.GradientTransformationExtraArgs:
  """Adam with a step count per LoRA vector and without weight decay.

  Args:
    learning_rate: a number, or a schedule: a function from the number of updates to the learning rate.
    b1, b2: decay rates of the first and second moments.
    eps: added to the square root of the bias-corrected second moment.
    options: `vectors`, `count_per_element` and `moments_dtype` of `scale_by_vector_adam`, whose masks `update` accepts.
  """
  return optax.chain(scale_by_vector_adam(b1, b2, eps, **options), optax.scale_by_learning_rate(learning_rate))


def clip_by_global_norm(grads, max_norm: float):
  """Scale the gradients by min(1, max_norm / (‖g‖ + 1e-6)), as in PyTorch's `clip_grad_norm_`, which the authors use.

  Returns:
    The scaled gradients, and their global norm ‖g‖ before scaling, [] in float32 or wider; see `global_norm`. The norm
    is inf if max_norm / ‖g‖ underflows to 0, since the scaled gradients are then 0.
  """
  norm = global_norm(grads)
  factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), jnp.where(factor == 0, jnp.inf, norm)


def global_norm(grads) -> jax.Array:
  """‖g‖ over all leaves, [] in float32 or wider.

  If the sum of squares overflows or underflows, gradients are scaled by a power of two before they are squared. The
  norm of finite gradients is therefore finite unless it exceeds the range of the dtype itself. If the sum does neither,
  the result is bitwise that of `optax.tree.norm`.
  """
  wide = lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32))
  norm = optax.tree.norm(jax.tree.map(wide, grads))
  dtype = jnp.finfo(norm.dtype)
  overflow, underflow = jnp.isinf(norm), norm < dtype.tiny**0.5 / dtype.eps

  def scaled_norm():
    large = 2.0 ** (dtype.maxexp * 25 // 32)  # 2^100 in float32: in the middle of the norms whose squares overflow
    unit = jnp.where(overflow, 1 / large, large).astype(norm.dtype)
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(norm.dtype) * unit, grads)) / unit

  return jax.lax.cond(overflow | underflow, scaled_norm, lambda: norm)
