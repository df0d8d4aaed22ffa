"""The interface of a method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from switchlora_jax.train_state import TrainState


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


def dtypes(config) -> dict[str, Any]:
  """`dtype` and `param_dtype` of a config, as every module of the model takes them."""
  return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def nothing(state: TrainState, skip) -> Adjusted:
  """For methods that leave the state to the optimizer."""
  del skip
  return Adjusted(state, {}, {})


class Method(NamedTuple):
  """A training method.

  Attributes:
    dense: the factory of the model's linear layers, `dense(features, name=…)`.
    optimizer: from a learning-rate schedule to an optax transformation.
    adjust: (state, skip) -> Adjusted, traced inside the train step; where `skip` is true nothing may change.
  """

  dense: Callable[..., Any]
  optimizer: Callable[[optax.Schedule], optax.GradientTransformationExtraArgs]
  adjust: Callable[..., Adjusted] = nothing
