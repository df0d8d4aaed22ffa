"""Low-rank factors in place of kernels, refactorised periodically (Glentis et al. 2025, arXiv 2505.22922).

Each kernel of a block is W = s·B·A, without a base kernel, so that its rank is at most r. Every K updates, before the
gradients of step t = K·j:

  B·A = UΣVᵀ,  A ← √Σ·Vᵀ,  B ← U·√Σ;  moments and step counts of Adam of A and B ← 0.

A restart does not change the function of the model, so it is also done if the steps around it are skipped. The learning
rate does not warm up again.

Two choices are ours, because we could not check them in the paper: both factors are drawn (`lowrank.factored`), and a
restart also resets the second moments and the step counts, so that its first updates have Adam's usual size.

State per kernel, in elements with p = r·(in + out): p weights and 2p moments. Full rank has 3·in·out.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.factored import FactoredDense, refactored
from switchlora_jax.lowrank.layers import LORA_A, LORA_B, adapter_scale, lora_vectors
from switchlora_jax.lowrank.optimizer import VectorAdamState
from switchlora_jax.methods import full
from switchlora_jax.methods.base import Method, TrainState, dtypes
from switchlora_jax.methods.optimizers import ADAM, make_optimizer
from switchlora_jax.methods.schedules import config_schedule
from switchlora_jax.models.architecture import smaller_sides

LEARNING_RATE = 1.5e-3  # of the authors' example for 60M
MIN_LR_RATIO = 0.1
ACCEPTED = ADAM  # a restart resets its state


def check(config):
  """Raise `UserError` if the rank, the scale or the interval of restarts is invalid."""
  full.check(config)
  check_factors(config)
  check_settings(config, "factored")


def check_factors(config):
  """Raise `UserError` unless the factors of every layer can have `config.rank` independent rows."""
  largest = min(smaller_sides(config.model).values())
  if not 1 <= config.rank <= largest:
    raise UserError(
      f"rank (={config.rank}) must be at least 1 and at most that of a kernel (min(in, out) = {largest}); "
      f"set --config.rank or use --config.method=full"
    )


def check_settings(config, section: str):
  """Raise `UserError` if `alpha` or `restart_every` of a section of the config is invalid."""
  settings = config[section]
  if not settings.alpha > 0:
    raise UserError(f"{section}.alpha (={settings.alpha}) must be greater than 0; set --config.{section}.alpha")
  if settings.restart_every < 0:
    raise UserError(
      f"{section}.restart_every (={settings.restart_every}) must be at least 1, or 0 for no restarts; "
      f"set --config.{section}.restart_every"
    )


def restart_count(config, every: int) -> int:
  """The number of restarts in the run; none in a full-rank warm start and at its end."""
  return (config.steps - 1) // every - config.warm_start_steps // every if every else 0


def describe_restarts(config, every: int) -> list[str]:
  """The number of restarts; no line without restarts."""
  return [f"restarts in the run: {restart_count(config, every)}, every {every} steps"] if every else []


def describe(config) -> list[str]:
  """The number of restarts."""
  return describe_restarts(config, config.factored.restart_every)


def warn_of_warm_start(config, kept: str) -> list[str]:
  """Warn that the kernels of a warm start are approximated.

  Args:
    kept: what approximates a kernel, for the message.
  """
  if not config.warm_start_steps and not config.warm_start_from:
    return []
  return [
    f"{config.method} approximates each kernel of the warm start by {kept}, so that the loss may rise there; to keep "
    f"the function, use --config.method=lora, switchlora or relora"
  ]


def warnings(config) -> list[str]:
  """Warn of a warm start, which this method can only approximate."""
  return warn_of_warm_start(config, f"a product of rank {config.rank}")


def restarts(config, every: int) -> Callable[[TrainState], TrainState]:
  """The `before_gradients` that restarts every `every` steps; 0: never.

  The factors of one layer are decomposed after those of another, in place.
  """

  def restart(_, carry):
    params, opt_state = carry
    return refactor(params), reset_moments(opt_state, lora_vectors(params))

  def before_gradients(state: TrainState) -> TrainState:
    due = (state.step % every == 0) & (state.step > config.warm_start_steps)
    # A loop with 0 or 1 iterations: XLA copies arrays that pass through a conditional.
    params, opt_state = jax.lax.fori_loop(state.step, state.step + due, restart, (state.params, state.opt_state))
    return state._replace(params=params, opt_state=opt_state)

  return before_gradients if every else lambda state: state


def refactor(params):
  """The parameters with `refactored` factors in all layers, stacked as [layers, r, in] and [layers, r, out]."""
  flat = flatten_dict(params)
  for path in [path[:-1] for path in flat if path[-1] == LORA_A]:
    a, b = (*path, LORA_A), (*path, LORA_B)
    flat[a], flat[b] = refactor_stack(flat[a], flat[b])
  return unflatten_dict(flat)


def refactor_stack(lora_a, lora_b):
  """`refactored` of stacked layers, one after the other, in place."""

  def refactor_layer(layer, stacks):
    new = refactored(*(stack[layer] for stack in stacks))
    return tuple(stack.at[layer].set(x) for stack, x in zip(stacks, new, strict=True))

  return jax.lax.fori_loop(0, len(lora_a), refactor_layer, (lora_a, lora_b))


def reset_moments(state: VectorAdamState, chosen) -> VectorAdamState:
  """Adam's state with moments and step counts of 0 in the leaves marked by `chosen`, a tree of bools."""
  cleared = lambda tree: jax.tree.map(lambda reset, x: jnp.zeros_like(x) if reset else x, chosen, tree)
  return VectorAdamState(*map(cleared, state))


def check_optimizer(opt_state):
  """Raise `ValueError` unless the state of the optimizer has moments and step counts per factor, for a restart."""
  if not isinstance(opt_state, VectorAdamState):
    raise ValueError(
      "a restart resets the moments and step counts of the factors, so the optimizer must be scale_by_vector_adam, "
      f"outside optax.chain; its state is a {type(opt_state).__name__}; use it, or set restart_every to 0"
    )


def build_layers(config, section: str, kind, **options) -> Method:
  """A method with layers of a class of `lowrank.factored`, Adam, and the restarts of a section of the config."""
  settings = config[section]
  return Method(
    partial(kind, rank=config.rank, alpha=settings.alpha, **dtypes(config), **options),
    make_optimizer(config, lora_vectors),
    config_schedule(config),
    adapter_scale(config.rank, settings.alpha),
    before_gradients=restarts(config, settings.restart_every),
    check_optimizer=check_optimizer if settings.restart_every else lambda opt_state: None,
  )


def build(config) -> Method:
  """`FactoredDense` layers, Adam, and restarts every `factored.restart_every` steps."""
  return build_layers(config, "factored", FactoredDense)
