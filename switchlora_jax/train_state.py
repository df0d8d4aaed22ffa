"""Everything a training run is made of at one moment, as one pytree: what is saved, restored and donated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switchlora_jax.spikes import Spikes, none_yet


class TrainState(NamedTuple):
  """The state before step `step`.

  Attributes:
    step: [] int32, updates done or skipped so far; schedules and random draws follow from it alone.
    params: what is trained. frozen: base kernels. candidates: spares, cursors and freeze timers ({} without).
    opt_state: of the optimizer over `params`.
    skipped: [] int32, updates skipped because a number was not finite; skipped_in_a_row: [] int32, the last of them.
    spikes: what is known of the losses so far, and how far the data are ahead of `step`.
  """

  step: jax.Array
  params: Any
  frozen: Any
  candidates: Any
  opt_state: Any
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  spikes: Spikes


def create(model, tx, seed: int, window: int) -> TrainState:
  """The state before step 0, for a `window` of losses. Pure: under `jax.eval_shape` it allocates nothing."""
  variables = model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))
  params = variables["params"]
  zero = lambda: jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero(),
    params=params,
    frozen=variables.get("frozen", {}),
    candidates=variables.get("candidates", {}),
    opt_state=tx.init(params),
    skipped=zero(),
    skipped_in_a_row=zero(),
    spikes=none_yet(window),
  )
