"""Adam that counts steps per LoRA vector and takes the switch's reset and freeze masks; schedule; clipping.

Knows nothing of models or configs: which leaves hold LoRA vectors in their rows is handed to it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class VectorAdamState(NamedTuple):
  """State of `scale_by_vector_adam`.

  Attributes:
    count: int32 updates since the last reset: [..., r, 1] where a leaf's rows are LoRA vectors, else [].
    mu, nu: first and second moments, shaped like the parameters.
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
) -> optax.GradientTransformationExtraArgs:
  """Adam whose step count is one number per LoRA vector, so that vectors can start afresh one by one.

  `update` takes, besides the usual, trees of masks like the parameters (leaves broadcast) and a flag:
    reset: where true, mu, nu and count go to 0 before this update (App. A: the counterpart of what was switched);
    freeze: where true, the gradient is 0. The count goes on: after a reset and N frozen steps the first
      live update has size (1-β1)/(1-β1^(N+1)) / √((1-β2)/(1-β2^(N+1))), 0.522 for N = 5, a warm-up;
    skip: [] bool; where true the update is 0 and the state stays as it was.
  Without them it is `optax.scale_by_adam` on one leaf after the other, to the bit.

  Args:
    vectors: from the parameters to a tree of bools, true for leaves [..., r, d] whose rows are LoRA vectors.
    count_per_element: a count as large as the parameter for every leaf (App. D). Same updates, 50% more memory.
  """

  def count_shape(is_vector, param):
    if count_per_element:
      return param.shape
    return (*param.shape[:-1], 1) if is_vector else ()

  def init(params):
    count = jax.tree.map(lambda v, p: jnp.zeros(count_shape(v, p), jnp.int32), vectors(params), params)
    return VectorAdamState(count, optax.tree.zeros_like(params), optax.tree.zeros_like(params))

  def update(updates, state, params=None, *, reset=None, freeze=None, skip=False, **_):
    del params
    reset = _no_vectors(updates) if reset is None else reset
    freeze = _no_vectors(updates) if freeze is None else freeze
    grads = jax.tree.map(lambda g, frozen: jnp.where(frozen | skip, 0, g), updates, freeze)
    fresh = jax.tree.map(lambda s: jax.tree.map(lambda x, hit: jnp.where(hit, 0, x), s, reset), state, is_leaf=_is_tree)
    if jax.tree.map(jnp.shape, fresh) != jax.tree.map(jnp.shape, state):
      raise ValueError(
        "a reset mask must broadcast to the step count of its leaf, and does not; pass vectors=…, which says whose "
        "rows are LoRA vectors (switchlora_jax.lora_vectors for the layers of this package)"
      )
    count = jax.tree.map(optax.safe_increment, fresh.count)
    mu = optax.tree.update_moment(grads, fresh.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, fresh.nu, b2, 2)
    direction = jax.tree.map(
      lambda m, v, c: jnp.where(skip, 0, _unbias(m, b1, c) / (jnp.sqrt(_unbias(v, b2, c)) + eps)), mu, nu, count
    )
    new_state = VectorAdamState(count, mu, nu)
    return direction, jax.tree.map(lambda new, old: jnp.where(skip, old, new), new_state, state)

  return optax.GradientTransformationExtraArgs(init, update)


def _is_tree(node):
  return not isinstance(node, VectorAdamState)


def _unbias(moment, decay, count):
  # A product, as XLA makes of a quotient whose divisor is broadcast: counts of any shape give the same bits.
  return moment * (1 / (1 - decay**count)).astype(moment.dtype)


def vector_adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8, **options) -> optax.GradientTransformationExtraArgs:
  """Adam with per-vector counts and no weight decay; `options` as in `scale_by_vector_adam`.

  Args:
    learning_rate: a number, or a schedule of the number of `update` calls, skipped ones included.
  """
  return optax.chain(scale_by_vector_adam(b1, b2, eps, **options), optax.scale_by_learning_rate(learning_rate))


def cosine_schedule(
  learning_rate: float, warmup_steps: int, total_steps: int, *, end: float = 0.0, floor: float = 0.0
) -> optax.Schedule:
  """Linear warm-up from 0 (the first update has learning rate 0), then a cosine to `end` at `total_steps`.

  After the warm-up it is never below `floor`. Both are fractions of `learning_rate`: ReLoRA's and GaLore's
  authors shrink the cosine, SwitchLoRA's cut it off.
  """
  cosine = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, total_steps, learning_rate * end)

  def schedule(count):
    count = jnp.asarray(count, float)  # an int32 count would give float32 in a float64 run
    return jnp.where(count < warmup_steps, cosine(count), jnp.maximum(cosine(count), learning_rate * floor))

  return schedule


def warm_up_again(schedule: optax.Schedule, last_start: Callable, warmup_steps: int) -> optax.Schedule:
  """`schedule`, but for a linear climb from 0, after each new start, to where it stands `warmup_steps` later.

  Args:
    last_start: from a step to the last new start before it; where there was none, any later step.
  """
  if warmup_steps == 0:
    return schedule

  def restarted(count):
    start = last_start(jnp.asarray(count))
    climb = jnp.asarray(count - start, float) / warmup_steps
    return jnp.where((climb >= 0) & (climb < 1), climb * schedule(start + warmup_steps), schedule(count))

  return restarted


def clip_by_global_norm(grads, max_norm: float):
  """Scale the gradients by min(1, max_norm / (‖g‖ + 1e-6)), as the authors do; returns them and ‖g‖ (≥ float32)."""
  norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads))
  factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), norm


def magnitude_mask(x, ratio: float):
  """Which elements of `x` exceed the `ratio`-quantile of |x|, taken in float32 as ReLoRA's authors do."""
  return jnp.abs(x) > jnp.quantile(jnp.abs(x).astype(jnp.float32), ratio).astype(x.dtype)


def prune_moments(state: VectorAdamState, pruned, keep: Callable) -> VectorAdamState:
  """The state with mu and nu zeroed, by one mask, where leaves are `pruned`; counts go on.

  Args:
    pruned: a tree of bools like the parameters, true for leaves stacked along layers, [layers, …].
    keep: (number of a layer among those of all leaves, its mu) -> mask like it, true for what stays.
  """
  (mu, structure), nu, first = jax.tree.flatten(state.mu), jax.tree.leaves(state.nu), 0
  for leaf, chosen in enumerate(jax.tree.leaves(pruned)):
    if chosen:
      mu[leaf], nu[leaf] = _prune_stack(mu[leaf], nu[leaf], first, keep)
      first += len(mu[leaf])
  return state._replace(mu=jax.tree.unflatten(structure, mu), nu=jax.tree.unflatten(structure, nu))


def _prune_stack(mu, nu, first, keep):
  """One layer after the other, in place: masks of all layers at once would take memory at every step."""

  def one(layer, moments):
    mask = keep(first + layer, moments[0][layer])
    return tuple(x.at[layer].set(jnp.where(mask, x[layer], 0)) for x in moments)

  return jax.lax.fori_loop(0, len(mu), one, (mu, nu))
