"""ReLoRA (Lialin et al. 2023, "High-Rank Training Through Low-Rank Updates"): LoRA that restarts from its own sum.

Every K steps the adapters are merged into the base weights and begin anew, so that updates of rank r add up to
more than rank r. The learning rate is 0 at t = K·j and climbs back; between that update and the next one's
gradients everything restarts:

  W ← W + s·B·A,  A ← uniform in ±1/√in,  B ← 0,  most of the moments of A and B ← 0, their count goes on.

The function does not change, so it does no harm that a restart takes place whether or not the updates around it
are skipped as not finite. Unlike the authors' code, which starts with A = B = 0 and so trains no adapter before the
first merge, ours starts with A drawn as at a restart; and m and v of an element are pruned together, because where
v goes and m stays the next update explodes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.kernel_storage import bases, read, write
from switchlora_jax.lowrank.layers import LoRADense, adapter_scale, lora_vectors, merge
from switchlora_jax.lowrank.optimizer import magnitude_mask, prune_moments, scale_by_vector_adam, warm_up_again
from switchlora_jax.methods.base import Method, TrainState, adapter_dtypes, cosine

LEARNING_RATE = 1e-3  # appendix C.1
MIN_LR_RATIO = 0.1
PRUNES = ("random", "magnitude")


def check(config):
  """Raise `UserError` unless restarts, pruning and scale make sense."""
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
  """The first multiple of K after the step at which the low-rank method begins."""
  every = config.relora.restart_every
  return (config.warm_start_steps // every + 1) * every


def describe(config) -> list[str]:
  """How often it restarts, and two ways in which it is not the ReLoRA of the paper."""
  every = config.relora.restart_every
  restarts = len(range(first_restart(config), config.steps - 1, every))
  lines = [f"restarts in the run: {restarts}, every {every} steps"]
  if not restarts:
    lines.append("WARNING: without a restart this is LoRA; lower --config.relora.restart_every below --config.steps")
  if not config.warm_start_steps and not config.warm_start_from:
    lines.append(
      "WARNING: ReLoRA is meant to follow a full-rank warm start, and has none here; "
      "set --config.warm_start_steps or --config.warm_start_from"
    )
  return lines


def jagged_cosine(config):
  """The config's cosine, here ending at `min_lr_ratio`, with a climb from 0 after each restart."""
  every, first = config.relora.restart_every, first_restart(config)
  last_restart = lambda step: jnp.maximum(step // every * every, first)
  return warm_up_again(cosine(config, end=config.min_lr_ratio), last_restart, config.relora.restart_warmup_steps)


def merge_adapters(params, frozen, draw, scale):
  """W ← W + s·B·A, A drawn anew, B ← 0 in all layers; returns params and frozen, with the same function.

  Args:
    draw: (number of a layer among all of them, shape (r, in)) -> its new A.
  """
  flat, merged = flatten_dict(params), {}
  for number, (path, base) in enumerate(sorted(bases(frozen).items())):
    a, b = (*path, "lora_a"), (*path, "lora_b")
    first = number * len(flat[a])
    base, flat[a], flat[b] = merge_stack(base, flat[a], flat[b], first, draw, scale)
    merged |= {(*path, name): value for name, value in base.items()}
  return unflatten_dict(flat), unflatten_dict(merged)


def merge_stack(base, lora_a, lora_b, first, draw, scale):
  """`merge_adapters` for the L layers from number `first` on, in place: at once they would take a second stack.

  Shapes: base {"kernel" [L, in, out], maybe its tail}, lora_a [L, r, in], lora_b [L, r, out].
  """
  wide = jnp.promote_types(base["kernel"].dtype, jnp.float32)

  def one(layer, stacks):
    base, lora_a, lora_b = stacks
    old = {name: stack[layer] for name, stack in base.items()}
    new = write(merge(read(old), lora_a[layer], lora_b[layer], scale, wide), old)
    base = {name: stack.at[layer].set(new[name]) for name, stack in base.items()}
    fresh = draw(first + layer, lora_a.shape[1:])
    return base, lora_a.at[layer].set(fresh), lora_b.at[layer].set(0)

  return jax.lax.fori_loop(0, len(lora_a), one, (base, lora_a, lora_b))


def draw_a(key, dtype, number, shape):
  """A new A for `merge_adapters`, uniform in ±1/√in."""
  bound = shape[1] ** -0.5
  return jax.random.uniform(jax.random.fold_in(key, number), shape, dtype, -bound, bound)


def survivors(key, relora, number, mu):
  """Which moments of one layer's A or B outlive a restart, [r, d] bool, from the first moments `mu`."""
  if relora.prune == "magnitude":
    return magnitude_mask(mu, relora.prune_ratio)
  return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - relora.prune_ratio, mu.shape)


def build(config) -> Method:
  """`LoRADense` layers under plain Adam; before the gradients of the step after t = K·j, the restart."""
  relora, scale = config.relora, adapter_scale(config.rank, config.relora.alpha)
  kinds = dict(alpha=relora.alpha, adapter_init="lora", kernel_tail=True, **adapter_dtypes(config))
  dense = partial(LoRADense, rank=config.rank, **kinds)
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
    # A loop of one turn or none, counted in steps, not a branch: XLA copies what passes through a branch.
    params, frozen, opt_state = jax.lax.fori_loop(state.step, state.step + due, restart, carry)
    return state._replace(params=params, frozen=frozen, opt_state=opt_state)

  return Method(dense, scale_by_vector_adam(), schedule, scale, before_gradients)
