"""Learning-rate schedules: functions from a step to its learning rate, shared by all methods.

Every schedule rises linearly from 0 to the peak in `warmup_steps` steps, and its rate at step `total_steps` is the peak
times `final_ratio`. Between them it follows `config.schedule.name`.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from switchlora_jax.errors import UserError


def check(config):
  """Raise `UserError` if a key of `config.schedule` is invalid, or if the schedule cannot end at `min_lr_ratio`."""
  name, share = config.schedule.name, config.schedule.decay_share
  if name not in SCHEDULES:
    raise UserError(f"schedule.name (={name!r}) must be one of {', '.join(SCHEDULES)}; set --config.schedule.name")
  if name == "constant" and config.min_lr_ratio not in (None, 1.0):
    raise UserError(
      f"min_lr_ratio (={config.min_lr_ratio}) must be 1 or unset, as schedule.name (='constant') ends at the peak; "
      f"set --config.schedule.name=linear or wsd to end lower"
    )
  if name == "wsd" and not 0 < share * config.steps <= config.steps - config.warmup_steps:
    raise UserError(
      f"schedule.decay_share (={share}) must be greater than 0, and leave room for the warm-up: with warmup_steps "
      f"(={config.warmup_steps}) of {config.steps} steps it may be at most {1 - config.warmup_steps / config.steps:g}; "
      f"set --config.schedule.decay_share"
    )


def default_final_ratio(config, of_method: float) -> float | None:
  """The default of `config.min_lr_ratio`: where the schedule ends by itself, else the default of the method.

  None for `inverse_sqrt`, whose own end depends on the number of steps, with which a run may be extended.
  """
  return {"constant": 1.0, "inverse_sqrt": None}.get(config.schedule.name, of_method)


def config_schedule(config) -> optax.Schedule:
  """The schedule of a resolved config.

  After a full-rank warm start within the run, the learning rate warms up again from 0, because the optimizer of the
  low-rank method starts with empty moments there.
  """
  options = {"decay_share": config.schedule.decay_share} if config.schedule.name == "wsd" else {}
  schedule = SCHEDULES[config.schedule.name](
    config.learning_rate, config.warmup_steps, config.steps, config.min_lr_ratio, **options
  )
  if not config.warm_start_steps:
    return schedule
  return warm_up_again(schedule, lambda _: config.warm_start_steps, config.warmup_steps)


def cosine_schedule(
  learning_rate: float, warmup_steps: int, total_steps: int, final_ratio: float = 0.0
) -> optax.Schedule:
  """Linear warm-up from 0 to the peak, then a cosine. The first update has learning rate 0.

  Args:
    learning_rate: the peak, reached at step `warmup_steps`.
    final_ratio: final learning rate / peak learning rate; the cosine ends there at `total_steps` and stays.
  """
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, warmup_steps, total_steps, learning_rate * final_ratio
  )
  return _of_floats(schedule)


def linear_schedule(learning_rate: float, warmup_steps: int, total_steps: int, final_ratio: float = 0.0):
  """Linear warm-up, then a straight line; arguments as of `cosine_schedule`."""
  return wsd_schedule(learning_rate, warmup_steps, total_steps, final_ratio, 1 - warmup_steps / total_steps)


def constant_schedule(learning_rate: float, warmup_steps: int, total_steps: int, final_ratio: float = 1.0):
  """Linear warm-up, then the peak; `final_ratio` must be 1."""
  del total_steps, final_ratio
  warm_up = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return _of_floats(optax.join_schedules([warm_up, optax.constant_schedule(learning_rate)], [warmup_steps]))


def wsd_schedule(
  learning_rate: float, warmup_steps: int, total_steps: int, final_ratio: float = 0.0, decay_share: float = 0.2
):
  """Warm-up, stable, decay: the peak until the last `decay_share` of the steps, then a straight line.

  Other arguments as of `cosine_schedule`.
  """
  decay_steps = min(max(1, round(decay_share * total_steps)), total_steps - warmup_steps)
  warm_up = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  decay = optax.linear_schedule(learning_rate, learning_rate * final_ratio, decay_steps)
  stages = [warm_up, optax.constant_schedule(learning_rate), decay]
  return _of_floats(optax.join_schedules(stages, [warmup_steps, total_steps - decay_steps]))


def inverse_sqrt_schedule(learning_rate: float, warmup_steps: int, total_steps: int, final_ratio: float | None = None):
  """Linear warm-up, then the peak times √(w / step) with w = max(1, warmup_steps).

  Args:
    final_ratio: shifts and scales the curve so that it ends at this ratio; None: it ends where it does by itself.
    others: as of `cosine_schedule`.
  """
  start = max(warmup_steps, 1)
  end = (start / total_steps) ** 0.5
  final_ratio = end if final_ratio is None else final_ratio

  def schedule(step):
    falling = (start / jnp.maximum(step, start)) ** 0.5
    falling = jnp.maximum(falling, end)  # stays at the end, as the other schedules do
    ratio = final_ratio + (1 - final_ratio) * (falling - end) / max(1 - end, 1e-12)
    return learning_rate * jnp.where(step < warmup_steps, step / start, ratio)

  return _of_floats(schedule)


SCHEDULES = {
  "cosine": cosine_schedule,
  "linear": linear_schedule,
  "constant": constant_schedule,
  "wsd": wsd_schedule,
  "inverse_sqrt": inverse_sqrt_schedule,
}


def _of_floats(schedule):
  return lambda step: schedule(jnp.asarray(step, float))  # an int32 step would give float32 in a float64 run


def warm_up_again(schedule: optax.Schedule, last_start: Callable, warmup_steps: int) -> optax.Schedule:
  """`schedule` with a linear warm-up after each new start, from 0 to its value `warmup_steps` later.

  Args:
    last_start: from a step to the last new start before it, or to any later step if there was none.
  """
  if warmup_steps == 0:
    return schedule

  def restarted(step):
    start = last_start(jnp.asarray(step))
    progress = jnp.asarray(step - start, float) / warmup_steps
    return jnp.where((progress >= 0) & (progress < 1), progress * schedule(start + warmup_steps), schedule(step))

  return restarted
