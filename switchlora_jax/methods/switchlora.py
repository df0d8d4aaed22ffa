"""SwitchLoRA: LoRA whose vectors are switched with spare candidates at every step (Algorithm 2)."""

from functools import partial

import jax
import jax.numpy as jnp

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import SwitchLoRADense
from switchlora_jax.lowrank.spares import coverage, draw_picks, draw_uniforms
from switchlora_jax.lowrank.switching import Switched, SwitchSchedule, expected_cycles, switch
from switchlora_jax.methods import lora
from switchlora_jax.methods.base import Adjusted, Method, TrainState

LEARNING_RATE = 2e-2  # section 4.1
MIN_LR_RATIO = 0.0
ORDERS = ("sequential", "random")


def check(config):
  """Raise `UserError` unless some layer can switch and the schedule leaves every vector time to thaw."""
  lora.check(config)
  model, hint = config.model, "or use --config.method=lora"
  if config.rank == 1:
    raise UserError(f"rank (=1) cannot switch: A's and B's slots must differ; set --config.rank to 2 or more {hint}")
  if config.rank >= model.hidden_size:  # the largest min(in, out) of any layer
    raise UserError(
      f"rank (={config.rank}) leaves no spare vectors in any layer (min(in, out) = {model.hidden_size}); "
      f"lower --config.rank {hint}"
    )
  interval, frozen = config.switch.interval, config.switch.freeze_steps
  if interval < 0 or frozen < 0:
    raise UserError(f"switch.interval (={interval}) and switch.freeze_steps (={frozen}) must not be negative")
  if 0 < interval < 2 * frozen:
    raise UserError(
      f"switch.interval (={interval}) must be 0 (never switch) or at least 2 × switch.freeze_steps (= {2 * frozen}): "
      f"raise --config.switch.interval or lower --config.switch.freeze_steps"
    )
  if config.switch.order not in ORDERS:
    raise UserError(
      f"switch.order (={config.switch.order!r}) must be one of {', '.join(ORDERS)}; set --config.switch.order"
    )
  for name in ("decay_point", "decay_to"):
    if not 0 < config.switch[name] < 1:
      raise UserError(f"switch.{name} (={config.switch[name]}) must lie between 0 and 1; set --config.switch.{name}")


def schedule(config) -> SwitchSchedule:
  """The switch schedule of a config."""
  keys = ("interval", "freeze_steps", "decay_point", "decay_to")
  return SwitchSchedule(total_steps=config.steps, **{key: config.switch[key] for key in keys})


def cycles(config) -> float:
  """How many times the candidates of a hidden × hidden layer are cycled over the run, after a warm start if any."""
  if not config.switch.interval:
    return 0.0
  plan = schedule(config)
  faded = plan.decay_to ** (config.warm_start_steps / (plan.decay_point * plan.total_steps))
  return faded * expected_cycles(plan, config.rank, config.model.hidden_size)


def describe(config) -> list[str]:
  """How often the candidates are cycled, which decides whether switching can matter, and a known danger."""
  if not config.switch.interval:
    return []
  lines = [f"candidates cycled over the run, hidden × hidden layers: {cycles(config):.2f} times"]
  if config.param_dtype == config.frozen_dtype == "bfloat16":
    lines.append(
      "WARNING: switching rounds bfloat16 base kernels at every step, and they drift; they do not with "
      "--config.param_dtype=float32, nor with --config.frozen_dtype=bfloat16 under it"
    )
  return lines


def build(config) -> Method:
  """`SwitchLoRADense` layers; between gradients and optimizer, the switch, without which kernels have no tails."""
  switches = config.switch.interval > 0
  kinds = dict(candidates_dtype=jnp.dtype(config.candidates_dtype), kernel_tail=switches)
  method = lora.build(config, partial(SwitchLoRADense, **kinds))
  if not switches:
    return method
  plan = schedule(config)

  def before_update(state: TrainState, skip) -> Adjusted:
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    random = config.switch.order == "random"
    moved = switch(
      state.params, state.frozen, state.candidates, schedule=plan, scale=method.scale, step=state.step,
      uniforms=draw_uniforms(key, state.candidates), skip=skip,
      picks=draw_picks(jax.random.fold_in(key, 2**31 - 1), state.candidates, plan) if random else None,
    )  # fmt: skip
    state = state._replace(params=moved.params, frozen=moved.frozen, candidates=moved.candidates)
    masks = {"freeze": moved.freeze} | ({"reset": moved.reset} if config.switch.reset else {})
    covered = {} if random else {"coverage": coverage(moved.candidates)}  # which only the order tells
    return Adjusted(state, masks, telemetry(moved) | covered)

  return method._replace(before_update=before_update)


def telemetry(moved: Switched) -> dict[str, jax.Array]:
  """What a step's switching did, over all layers.

  switched: vectors switched a side. frozen_share: of the LoRA vectors that can be switched, in [0, 1].
  moved_norm: Frobenius norm of what the base kernels absorbed.
  """
  masks = [mask for mask in jax.tree.leaves(moved.freeze) if jnp.ndim(mask)]
  frozen = sum(jnp.sum(mask) for mask in masks) / max(1, sum(mask.size for mask in masks))
  return {"switched": moved.count, "frozen_share": frozen, "moved_norm": moved.moved}
