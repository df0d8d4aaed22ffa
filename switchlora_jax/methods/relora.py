"""ReLoRA (Lialin et al. 2023, "High-Rank Training Through Low-Rank Updates"): LoRA with periodic restarts.

Every K steps the adapters are merged into the base kernels and reinitialised, so that the sum of the updates can have a
rank above r. The learning rate is 0 at step t = K·j and warms up again afterwards. A restart happens after that update
and before the gradients of the next step:

  W ← W + s·B·A,  A ← uniform in ±1/√in,  B ← 0,  most moments of A and B ← 0; the step counts are kept.

A restart does not change the function of the model, except for the rounding of base kernels in 16 or 8 bits, so it is
also done if the steps around it are skipped.

There are two deviations from the authors' code. It starts with A = B = 0, so that no adapter is trained before the
first merge; this module draws A at the start as at a restart. It prunes the first and second moments independently;
this module uses one mask for both, because an element with a first but no second moment would get a very large update.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.kernel_storage import KERNEL, frozen_layers, load_kernel, store_kernel
from switchlora_jax.lowrank.layers import LORA_A, LORA_B, LoRADense, adapter_scale, lora_vectors, merge
from switchlora_jax.lowrank.optimizer import VectorAdamState
from switchlora_jax.methods import lora
from switchlora_jax.methods.base import Method, TrainState, adapter_dtypes
from switchlora_jax.methods.optimizers import ADAM, make_optimizer
from switchlora_jax.methods.schedules import config_schedule, warm_up_again

LEARNING_RATE = 1e-3  # appendix C.1
MIN_LR_RATIO = 0.1
ACCEPTED = ADAM  # a restart prunes its moments
PRUNES = ("random", "magnitude")


def check(config):
  """Raise `UserError` if a setting of restarts, pruning or scale is invalid."""
  relora, every = config.relora, config.relora.restart_every
  if config.rank < 1:
    raise UserError(f"rank (={config.rank}) must be at least 1; set --config.rank or use --config.method=full")
  if not relora.alpha > 0:
    raise UserError(f"relora.alpha (={relora.alpha}) must be greater than 0; set --config.relora.alpha")
  if every < 1:
    raise UserError(f"relora.restart_every (={every}) must be at least 1; set --config.relora.restart_every")
  if not 0 <= relora.restart_warmup_steps < every:
    raise UserError(
      f"relora.restart_warmup_steps (={relora.restart_warmup_steps}) must be at least 0 and less than "
      f"relora.restart_every (={every}); set --config.relora.restart_warmup_steps or --config.relora.restart_every"
    )
  if config.warmup_steps >= every:
    raise UserError(
      f"warmup_steps (={config.warmup_steps}) must be less than relora.restart_every (={every}); "
      f"set --config.warmup_steps or --config.relora.restart_every"
    )
  if relora.prune not in PRUNES:
    raise UserError(f"relora.prune (={relora.prune!r}) must be one of {', '.join(PRUNES)}; set --config.relora.prune")
  if not 0 <= relora.prune_ratio <= 1:
    raise UserError(
      f"relora.prune_ratio (={relora.prune_ratio}) must lie between 0 and 1; set --config.relora.prune_ratio"
    )


def first_restart(config) -> int:
  """The step of the first restart: the first multiple of K after the full-rank warm start."""
  every = config.relora.restart_every
  return (config.warm_start_steps // every + 1) * every


def restart_count(config) -> int:
  """The number of restarts in the run."""
  return len(range(first_restart(config), config.steps - 1, config.relora.restart_every))


def describe(config) -> list[str]:
  """The number of restarts."""
  return [f"restarts in the run: {restart_count(config)}, every {config.relora.restart_every} steps"]


def warnings(config) -> list[str]:
  """As LoRA's, and warn if the run has no restart or no full-rank warm start."""
  lines = lora.warnings(config)
  if not restart_count(config):
    lines.append("without a restart this is LoRA; lower --config.relora.restart_every below --config.steps")
  if not config.warm_start_steps and not config.warm_start_from:
    lines.append(
      "ReLoRA is meant to follow a full-rank warm start, and has none here; "
      "set --config.warm_start_steps or --config.warm_start_from"
    )
  return lines


def jagged_cosine(config):
  """The schedule of the config with a linear warm-up from 0 after each restart."""
  every, first = config.relora.restart_every, first_restart(config)
  last_restart = lambda step: jnp.maximum(step // every * every, first)
  return warm_up_again(config_schedule(config), last_restart, config.relora.restart_warmup_steps)


def merge_adapters(params, frozen, draw, scale):
  """W ← W + s·B·A, new A, B ← 0 in all layers; returns the new params and frozen, which have the same function.

  Args:
    draw: (number of a layer among all layers, shape (r, in)) -> its new A.
  """
  flat, merged = flatten_dict(params), {}
  for number, (path, base) in enumerate(sorted(frozen_layers(frozen).items())):
    a, b = (*path, LORA_A), (*path, LORA_B)
    first = number * len(flat[a])
    base, flat[a], flat[b] = merge_stack(base, flat[a], flat[b], first, draw, scale)
    merged |= {(*path, name): value for name, value in base.items()}
  return unflatten_dict(flat), unflatten_dict(merged)


def merge_stack(base, lora_a, lora_b, first, draw, scale):
  """`merge_adapters` for L stacked layers, the first of which has the number `first`.

  The layers are merged one after the other, in place; all at once would need memory for a second stack.

  Shapes: base {"kernel": [L, in, out]} or with the residual, lora_a [L, r, in], lora_b [L, r, out].
  """
  wide = jnp.promote_types(base[KERNEL].dtype, jnp.float32)

  def merge_layer(layer, stacks):
    base, lora_a, lora_b = stacks
    old = {name: stack[layer] for name, stack in base.items()}
    new = store_kernel(merge(load_kernel(old), lora_a[layer], lora_b[layer], scale, wide), old)
    base = {name: stack.at[layer].set(new[name]) for name, stack in base.items()}
    fresh = draw(first + layer, lora_a.shape[1:])
    return base, lora_a.at[layer].set(fresh), lora_b.at[layer].set(0)

  return jax.lax.fori_loop(0, len(lora_a), merge_layer, (base, lora_a, lora_b))


def draw_a(key, dtype, number, shape):
  """A new A of shape (r, in) for `merge_adapters`, uniform in ±1/√in."""
  bound = shape[1] ** -0.5
  return jax.random.uniform(jax.random.fold_in(key, number), shape, dtype, -bound, bound)


def magnitude_mask(x, ratio: float):
  """Mark the elements of `x` above the `ratio`-quantile of |x|, computed in float32 as in the authors' code."""
  return jnp.abs(x) > jnp.quantile(jnp.abs(x).astype(jnp.float32), ratio).astype(x.dtype)


def prune_moments(state: VectorAdamState, pruned, keep: Callable) -> VectorAdamState:
  """Set most elements of mu and nu to 0, by the same mask, in the leaves marked by `pruned`; counts are kept.

  Args:
    pruned: a tree of bools like the parameters, true for leaves stacked along layers, [layers, …].
    keep: (number of a layer among those of all leaves, its mu) -> mask of the elements to keep.
  """
  (mu, structure), nu, first = jax.tree.flatten(state.mu), jax.tree.leaves(state.nu), 0
  for leaf, chosen in enumerate(jax.tree.leaves(pruned)):
    if chosen:
      mu[leaf], nu[leaf] = _prune_stack(mu[leaf], nu[leaf], first, keep)
      first += len(mu[leaf])
  return state._replace(mu=jax.tree.unflatten(structure, mu), nu=jax.tree.unflatten(structure, nu))


def _prune_stack(mu, nu, first, keep):
  """Prune one layer after the other, in place; masks of all layers at once would take memory in every step."""

  def prune_layer(layer, moments):
    mask = keep(first + layer, moments[0][layer])
    return tuple(x.at[layer].set(jnp.where(mask, x[layer], 0)) for x in moments)

  return jax.lax.fori_loop(0, len(mu), prune_layer, (mu, nu))


def survivors(key, relora, number, mu):
  """Mask [r, d] of the moments of one layer's A or B that a restart keeps; `mu` are its first moments."""
  if relora.prune == "magnitude":
    return magnitude_mask(mu, relora.prune_ratio)
  return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - relora.prune_ratio, mu.shape)


def build(config) -> Method:
  """`LoRADense` layers and Adam; the restart precedes the gradients of step K·j + 1."""
  relora, scale = config.relora, adapter_scale(config.rank, config.relora.alpha)
  options = dict(alpha=relora.alpha, adapter_init="lora", kernel_residual=True, **adapter_dtypes(config))
  dense = partial(LoRADense, rank=config.rank, **options)
  schedule, dtype = jagged_cosine(config), jnp.dtype(config.param_dtype)

  def restart(step, carry):
    params, frozen, opt_state = carry
    for_a, for_moments = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
    params, frozen = merge_adapters(params, frozen, partial(draw_a, for_a, dtype), scale)
    return params, frozen, prune_moments(opt_state, lora_vectors(params), partial(survivors, for_moments, relora))

  def before_gradients(state: TrainState) -> TrainState:
    last = state.step - 1
    due = (last % relora.restart_every == 0) & (last >= first_restart(config))
    carry = (state.params, state.frozen, state.opt_state)
    # A loop with 0 or 1 iterations: XLA copies arrays that pass through a conditional. Its counter is the step.
    params, frozen, opt_state = jax.lax.fori_loop(state.step, state.step + due, restart, carry)
    return state._replace(params=params, frozen=frozen, opt_state=opt_state)

  return Method(
    dense, make_optimizer(config), schedule, scale, before_gradients=before_gradients, check_optimizer=check_optimizer
  )


def check_optimizer(opt_state):
  """Raise `ValueError` unless the state of the optimizer has the moments that a restart prunes."""
  if not {"mu", "nu"} <= set(getattr(opt_state, "_fields", ())):
    raise ValueError(
      "the state of ReLoRA's optimizer must be a NamedTuple with the moments mu and nu, which a restart prunes; "
      f"it is a {type(opt_state).__name__}; use for example optax.scale_by_adam(), outside optax.chain, or method=lora"
    )
