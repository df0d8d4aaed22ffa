"""SwitchLoRA: LoRA that switches some of its vectors with spare candidates in every step (Algorithm 2)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import CANDIDATES, FRESH, LORA_A, LORA_B, SwitchLoRADense
from switchlora_jax.lowrank.optimizer import find_vector_adam, signal_to_noise
from switchlora_jax.lowrank.spares import (
  FreshVectors,
  coverage,
  draw_spare_indices,
  draw_uniforms,
  exchanged_bytes,
  switchable,
)
from switchlora_jax.lowrank.switching import Choice, Switched, SwitchSchedule, expected_loads, switch
from switchlora_jax.lowrank.transport import transport_moments
from switchlora_jax.methods import lora
from switchlora_jax.methods.base import Adjusted, Method, TrainState
from switchlora_jax.methods.optimizers import ADAM
from switchlora_jax.methods.schedules import config_schedule
from switchlora_jax.models.architecture import layers_of_full_rank, smaller_sides

LEARNING_RATE = 2e-2  # section 4.1
MIN_LR_RATIO = 0.0
ACCEPTED = ADAM  # a switch resets and freezes its state
ORDERS = ("sequential", "random")
DECAYS = (EXPONENTIAL := "exponential", "learning_rate")
STATES = (RESET := "reset", "keep", TRANSPORT := "transport")
SEQUENTIAL, SNR = SLOTS = ("sequential", "snr")
RANDOM_ORDER, FRESH_VECTORS = (
  2**31 - 1,
  2**31 - 2,
)  # folded into keys; steps and layers have smaller numbers in practice


def check(config):
  """Raise `UserError` unless a layer can switch and vectors are frozen for at most half a switch interval."""
  lora.check(config)
  hint = "or use --config.method=lora"
  if config.rank == 1:
    raise UserError(
      f"rank (=1) cannot switch: a step must not switch a slot in both A and B; set --config.rank to 2 or more {hint}"
    )
  if config.rank >= (candidates := max(smaller_sides(config.model).values())):
    raise UserError(
      f"rank (={config.rank}) leaves no spare vectors in any layer (min(in, out) = {candidates}); "
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
  for name, values in {"order": ORDERS, "decay": DECAYS, "state": STATES, "slots": SLOTS}.items():
    if config.switch[name] not in values:
      raise UserError(
        f"switch.{name} (={config.switch[name]!r}) must be one of {', '.join(values)}; set --config.switch.{name}"
      )
  if interval > 0 and not 0 <= config.switch.start < config.steps:
    raise UserError(
      f"switch.start (={config.switch.start}) must be at least 0 and less than steps (={config.steps}); "
      f"set --config.switch.start, or --config.switch.interval=0 to disable switching"
    )
  if config.switch.state == TRANSPORT and config.switch.init == "lora":
    raise UserError(
      "switch.state=transport cannot be combined with switch.init=lora, which sets B and its candidates to zero; set "
      "--config.switch.init=switchlora, or another --config.switch.state"
    )
  if config.switch.min_age < 0 or not config.switch.snr_below > 0:
    raise UserError(
      f"switch.min_age (={config.switch.min_age}) must not be negative, and switch.snr_below "
      f"(={config.switch.snr_below}) must be greater than 0; set --config.switch.min_age, --config.switch.snr_below"
    )
  _check_candidates(config)
  for name in ("decay_point", "decay_to"):
    if not 0 < config.switch[name] < 1:
      raise UserError(f"switch.{name} (={config.switch[name]}) must lie between 0 and 1; set --config.switch.{name}")


def _check_candidates(config):
  """Raise `UserError` if the kind of candidates is unknown, or a setting of stored ones is given for fresh ones."""
  kind = config.switch.candidates
  if kind not in CANDIDATES:
    raise UserError(
      f"switch.candidates (={kind!r}) must be stored (evicted vectors are kept and come back) or fresh (each vector is "
      "a new random one, and nothing is stored); set --config.switch.candidates"
    )
  if kind != FRESH:
    return
  given = {
    "switch.order": config.switch.order == "random",
    "sharding.candidates": config.sharding.candidates == "host",
    "candidates_dtype": config.candidates_dtype not in (None, config.param_dtype),
  }
  if found := [key for key in given if given[key]]:
    raise UserError(
      f"{found[0]} is a setting of stored candidates, and switch.candidates=fresh stores none; leave out "
      f"--config.{found[0]}, or --config.switch.candidates"
    )


def schedule(config) -> SwitchSchedule:
  """The switching schedule of a resolved config."""
  keys = ("interval", "freeze_steps", "decay_point", "decay_to", "start")
  plan = SwitchSchedule(total_steps=config.steps, **{key: config.switch[key] for key in keys})
  if config.switch.decay == EXPONENTIAL:
    return plan
  learning_rate = config_schedule(config)
  return plan._replace(curve=lambda step: learning_rate(step) / config.learning_rate)


def loads(config) -> float:
  """Expected number of vectors that the run loads per factor of a layer; a warm start does not switch."""
  return expected_loads(schedule(config), config.rank, config.warm_start_steps)


def cycles(config) -> float:
  """Expected number of cycles through the candidates of a hidden × hidden layer."""
  return loads(config) / (config.model.hidden_size - config.rank)


def describe(config) -> list[str]:
  """The number of cycles through the candidates; far below 1, switching can have little effect.

  With fresh candidates, the number of vectors that are loaded.
  """
  if not config.switch.interval:
    return []
  most = "at most " if config.switch.slots == SNR else ""
  if config.switch.candidates == FRESH:
    return [f"new vectors over the run: {most}{loads(config):.0f} per factor of a layer"]
  return [f"candidates cycled over the run, hidden × hidden layers: {most}{cycles(config):.2f} times"]


def warnings(config) -> list[str]:
  """As LoRA's, and warn of layers without spares and of base kernels that drift."""
  lines = lora.warnings(config)
  if not config.switch.interval:
    return lines
  if layers := layers_of_full_rank(config.model, config.rank):
    lines.append(f"the layers {layers} have no spare vectors at rank {config.rank} and are never switched")
  if 0 < config.switch.start < config.warm_start_steps:
    lines.append(
      f"switch.start (={config.switch.start}) lies in the full-rank phase, which does not switch; set it to "
      f"warm_start_steps (={config.warm_start_steps}) to start the decay of the switching rate there"
    )
  if not config.param_dtype == config.frozen_dtype == "bfloat16":
    return lines
  return [
    *lines,
    "switching rounds bfloat16 base kernels at every step, so that they drift; set --config.param_dtype=float32, with "
    "which --config.frozen_dtype=bfloat16 adds a residual, and they drift about 260 times less",
  ]


def build(config) -> Method:
  """`SwitchLoRADense` layers and the switch; with an interval of 0, neither a switch nor residuals of the kernels."""
  switches, fresh = config.switch.interval > 0, config.switch.candidates == FRESH
  by_snr = config.switch.slots == SNR
  options = dict(
    candidates=config.switch.candidates, candidates_dtype=jnp.dtype(config.candidates_dtype), ages=by_snr and switches
  )
  method = lora.build(config, partial(SwitchLoRADense, **options, kernel_residual=switches))
  if not switches:
    return method
  plan, fold = schedule(config), jax.random.fold_in

  def before_update(state: TrainState, skip) -> Adjusted:
    seeded = jax.random.key(config.seed)
    key, random = fold(seeded, state.step), config.switch.order == "random"
    moved = switch(
      state.params, state.frozen, state.candidates, schedule=plan, scale=method.scale, step=state.step,
      uniforms=draw_uniforms(key, state.candidates), skip=skip,
      spare_indices=draw_spare_indices(fold(key, RANDOM_ORDER), state.candidates, plan) if random else None,
      fresh=FreshVectors(fold(seeded, FRESH_VECTORS), config.switch.init) if fresh else None,
      choice=noisiest(config, state) if by_snr else None,
    )  # fmt: skip
    if config.switch.state == TRANSPORT:
      state = state._replace(opt_state=transport_moments(state.opt_state, state.params, moved.params, moved.reset))
    state = state._replace(params=moved.params, frozen=moved.frozen, candidates=moved.candidates)
    masks = {"freeze": moved.freeze} | ({"reset": moved.reset} if config.switch.state == RESET else {})
    covered = {} if random or fresh else {"coverage": coverage(moved.candidates)}
    per_kind = switched_by_kind(moved) if by_snr else {}
    return Adjusted(state, masks, switch_metrics(moved) | per_kind | covered)

  return method._replace(
    before_update=before_update,
    check_optimizer=check_optimizer,
    exchanged_bytes=lambda candidates: exchanged_bytes(candidates, plan),
  )


def check_optimizer(opt_state):
  """Raise `ValueError` unless the optimizer applies the masks of the switch; `optax.chain` would hide that it does not.

  The structure of the state is checked.
  """
  if find_vector_adam(opt_state) is None:
    raise ValueError(
      "the optimizer of SwitchLoRA must be or contain scale_by_vector_adam(vectors=lora_vectors), which resets and "
      "freezes the vectors that a switch marks; this one does not; add it, or use method=lora"
    )


def noisiest(config, state: TrainState) -> Choice:
  """The vectors whose counterparts have the smallest signal-to-noise ratio of their gradients.

  The gradient of b_k is s·Ga_k: if it is mostly noise, the model learns little along a_k, which is then switched.
  """
  adam, optimizer = find_vector_adam(state.opt_state), config.optimizer
  assert adam is not None, "check_optimizer requires it"
  mu, nu, count = (flatten_dict(tree) for tree in (adam.mu, adam.nu, adam.count))
  ratio = lambda path: signal_to_noise(mu[path], nu[path], count[path], optimizer.b1, optimizer.b2)
  values = {path: (ratio((*path, LORA_B)), ratio((*path, LORA_A))) for path in switchable(state.candidates)}
  return Choice(values, config.switch.min_age, config.switch.snr_below)


def switched_by_kind(moved: Switched) -> dict[str, jax.Array]:
  """{"switched/q": number of vectors switched per factor in all layers of the kind, and so on}."""
  masks = flatten_dict(moved.reset)
  return {
    f"switched/{path[-2]}": jnp.sum(mask, dtype=jnp.int32)
    for path, mask in masks.items()
    if path[-1] == LORA_A and jnp.ndim(mask)
  }


def switch_metrics(moved: Switched) -> dict[str, jax.Array]:
  """Metrics of the switch of one step, over all layers.

  Returns:
    switched: number of vectors switched per factor. frozen_share: share of the switchable LoRA vectors that are
    frozen, in [0, 1]. moved_norm: Frobenius norm of the change of the base kernels.
  """
  masks = [mask for mask in jax.tree.leaves(moved.freeze) if jnp.ndim(mask)]
  frozen = sum(jnp.sum(mask) for mask in masks) / max(1, sum(mask.size for mask in masks))
  return {"switched": moved.count, "frozen_share": frozen, "moved_norm": moved.moved}
