"""The interface of a method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from switchlora_jax.lowrank.optimizer import cosine_schedule, warm_up_again


class TrainState(NamedTuple):
  """The state before step `step`.

  Attributes:
    step: [] int32, updates done or skipped so far; schedules and random draws follow from it alone.
    params: what is trained. frozen: base kernels. candidates: spares, cursors and freeze timers ({} without).
    opt_state: of the optimizer over `params`.
    skipped: [] int32, updates skipped because a number was not finite; skipped_in_a_row: [] int32, the last of them.
    spikes: state of the loss-spike detector, `training.anomalies.SpikeState`.
  """

  step: jax.Array
  params: Any
  frozen: Any
  candidates: Any
  opt_state: Any
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  spikes: Any


class Adjusted(NamedTuple):
  """What a method does between the gradients and the optimizer.

  Attributes:
    state: the train state with arrays moved.
    masks: keyword arguments for the optimizer's `update` (reset, freeze).
    metrics: name to [] array, logged with the step.
  """

  state: TrainState
  masks: dict[str, Any]
  metrics: dict[str, Any]


def nothing(state: TrainState, skip) -> Adjusted:
  """For methods that leave the state to the optimizer."""
  del skip
  return Adjusted(state, {}, {})


class Method(NamedTuple):
  """A training method.

  Attributes:
    dense: the factory of the model's linear layers, `dense(features, name=…)`.
    optimizer: an optax transformation from gradients to what the learning rate is multiplied with.
    schedule: from a step to its learning rate; the step is the train state's, the only clock there is.
    scale: s = α/r where the layers have adapters, else None.
    before_gradients: state -> state before the gradients of a step, traced inside the train step; keeps the function.
    before_update: (state, skip) -> Adjusted, likewise, between gradients and optimizer; where `skip` is true nothing
      may change.
    optimizer_metrics: the optimizer's state after an update -> name to [] array, logged with the step.
  """

  dense: Callable[..., Any]
  optimizer: optax.GradientTransformationExtraArgs
  schedule: optax.Schedule
  scale: float | None = None
  before_gradients: Callable[[TrainState], TrainState] = lambda state: state
  before_update: Callable[..., Adjusted] = nothing
  optimizer_metrics: Callable[[Any], dict[str, Any]] = lambda opt_state: {}


def dtypes(config) -> dict[str, Any]:
  """`dtype` and `param_dtype` of a config, as every module of the model takes them."""
  return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def adapter_dtypes(config) -> dict[str, Any]:
  """Those and `frozen_dtype`, as layers with adapters take them."""
  return dtypes(config) | {"frozen_dtype": jnp.dtype(config.frozen_dtype)}


def cosine(config, **bounds) -> optax.Schedule:
  """The config's warm-up and cosine, and a second warm-up where a full-rank warm start hands over.

  Moments start afresh there, as at step 0. `bounds` as in `cosine_schedule`.
  """
  schedule = cosine_schedule(config.learning_rate, config.warmup_steps, config.steps, **bounds)
  if not config.warm_start_steps:
    return schedule
  return warm_up_again(schedule, lambda _: config.warm_start_steps, config.warmup_steps)
