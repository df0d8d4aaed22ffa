"""The interface between a training method and the train step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
  """The training state before step `step`.

  Attributes:
    step: [] int32, number of steps so far, including skipped ones. Schedules and random draws depend on it alone.
    params: trainable parameters, the only ones that `jax.grad` sees.
    frozen: base kernels, or the positions of sparse values; {} if the method has neither.
    candidates: spares, cursors and freeze timers; {} if the method has none.
    opt_state: state of the optimizer over `params`.
    skipped: [] int32, number of steps skipped because the loss or the gradient was not finite.
    skipped_in_a_row: [] int32, number of such steps up to and including the last step.
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
  """The result of a method's `before_update`.

  Attributes:
    state: the train state, with params, frozen and candidates changed.
    masks: keyword arguments for the optimizer's `update` (reset, freeze). Leave it empty for an optimizer that takes
      no extra arguments.
    metrics: {name: [] array}, logged with the step.
  """

  state: TrainState
  masks: dict[str, Any]
  metrics: dict[str, Any]


def unchanged(state: TrainState, skip) -> Adjusted:
  """The default `before_update`."""
  del skip
  return Adjusted(state, {}, {})


class Method(NamedTuple):
  """A training method: the layers of the model, the optimizer, and hooks around its update.

  Only `dense`, `optimizer` and `schedule` are required. LoRA, for example, is a factory of `LoRADense` layers with
  Adam. One step of `training.step.make_train_step` does, in this order:

    state = before_gradients(state)
    loss and gradients, clipped; `skip` is true if they are not finite or the loss is a spike to skip
    state, masks, metrics = before_update(state, skip)
    directions, opt_state = optimizer.update(gradients, opt_state, params, **masks)
    params = params - schedule(step) * directions

  All of it is traced into one compiled step. If `skip` is true, the train step keeps the old params and opt_state
  around any optimizer. An optimizer therefore needs no code for skipped steps and never gets gradients that are not
  finite.

  Attributes:
    dense: factory of the linear layers of a block, `dense(features, name=…)`.
    optimizer: an Optax transformation from gradients to directions, without learning rate and sign. It can be any, for
      example `optax.scale_by_adam()`, if the hooks neither return masks nor use its state. It must apply the masks that
      `before_update` returns; a transformation in an `optax.chain` silently ignores masks that it does not know.
      SwitchLoRA returns masks and needs a `scale_by_vector_adam`, alone or in a chain. ReLoRA prunes the attributes
      `mu` and `nu` of the optimizer state, so it needs an optimizer whose state has them, not a chain.
    schedule: from the step to the learning rate. The step is that of the train state.
    scale: s = α/r if the layers have adapters, else None.
    before_gradients: TrainState -> TrainState, called before the gradients of a step. It must not change the function
      of the model, and is not subject to `skip`.
    before_update: (TrainState, skip) -> Adjusted, called between the gradients and the optimizer. It must change
      nothing if `skip` [] bool is true. The train step does not select between old and new frozen kernels and
      candidates, because that would copy them.
    check_optimizer: optimizer state (arrays or ShapeDtypeStructs) -> None, called when a phase is built. It raises
      `ValueError` if the hooks cannot work with that state.
    optimizer_metrics: optimizer state after the update -> {name: [] array}, logged with the step.
    exchanged_bytes: `candidates` (arrays or ShapeDtypeStructs) -> the largest number of bytes of spares that one step
      reads, and that it writes back.
  """

  dense: Callable[..., Any]
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  scale: float | None = None
  before_gradients: Callable[[TrainState], TrainState] = lambda state: state
  before_update: Callable[..., Adjusted] = unchanged
  check_optimizer: Callable[[Any], None] = lambda opt_state: None
  optimizer_metrics: Callable[[Any], dict[str, Any]] = lambda opt_state: {}
  exchanged_bytes: Callable[[Any], int] = lambda candidates: 0


def dtypes(config) -> dict[str, Any]:
  """`dtype` and `param_dtype` of a config, as arguments of the model's modules."""
  return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def adapter_dtypes(config) -> dict[str, Any]:
  """`dtype`, `param_dtype` and `frozen_dtype` of a config, as arguments of layers with adapters."""
  return dtypes(config) | {"frozen_dtype": jnp.dtype(config.frozen_dtype)}
