"""Learning-rate schedules: functions from a step to its learning rate, shared by all methods."""

from collections.abc import Callable

import jax.numpy as jnp
import optax


def config_schedule(config) -> optax.Schedule:
  """The schedule of a config: linear warm-up, then a cosine to `min_lr_ratio` times the peak at `steps`.

  After a full-rank warm start within the run, the learning rate warms up again from 0, because the optimizer of the
  low-rank method starts with empty moments there.
  """
  schedule = cosine_schedule(config.learning_rate, config.warmup_steps, config.steps, config.min_lr_ratio)
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
