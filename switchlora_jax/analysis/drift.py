"""Drift of base kernels under switching, for several storage formats: a study of one layer.

The study uses the layer and the `switch` of training. In place of gradients, every LoRA vector takes a small random
step before each switch. All formats see the same vectors, so their weights differ only by rounding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switchlora_jax.lowrank.kernel_storage import KERNEL, load_kernel
from switchlora_jax.lowrank.layers import ADAPTER, SwitchLoRADense, merge
from switchlora_jax.lowrank.spares import draw_uniforms
from switchlora_jax.lowrank.switching import SwitchSchedule, switch

TRAINED = 0.01  # step length relative to the vector's standard deviation; scaled by the switching rate
EXACT, STOCHASTIC = "float32", "bfloat16, stochastic rounding"
FORMATS = {  # attributes of the layer
  EXACT: dict(),
  "bfloat16": dict(frozen_dtype=jnp.bfloat16, kernel_residual=False),
  STOCHASTIC: dict(),
  "bfloat16 + int8 residual": dict(frozen_dtype=jnp.bfloat16),
  "int8": dict(frozen_dtype=jnp.int8, kernel_residual=False),
  "int8 + int8 residual": dict(frozen_dtype=jnp.int8),
}


class Setting(NamedTuple):
  """A layer [size, size], its rank, the switch schedule, and the number of steps to simulate."""

  size: int
  rank: int
  schedule: SwitchSchedule
  steps: int


def drifts(setting: Setting, points: int) -> dict[str, list[float]]:
  """Vectors switched per factor and the drift of each format, at `points` equally spaced steps.

  The drift is ‖W − W₃₂‖ / ‖W₃₂‖ (Frobenius norm) of the merged weight W = kernel + s·AᵀB; W₃₂ has a float32 kernel.
  """
  switched, exact = merged_weights(setting, EXACT, points)
  drift = lambda weights: np.linalg.norm(weights - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
  others = {name: merged_weights(setting, name, points)[1] for name in FORMATS if name != EXACT}
  return {"switched": switched.tolist()} | {name: drift(weights).tolist() for name, weights in others.items()}


def merged_weights(setting: Setting, storage: str, points: int) -> tuple[np.ndarray, np.ndarray]:
  """Vectors switched per factor [points] and the merged weight [points, size, size], in float32."""
  layer = SwitchLoRADense(setting.size, setting.rank, **FORMATS[storage])
  seed, every = jax.random.key(0), setting.steps // points

  def step(t, variables):
    key = jax.random.fold_in(seed, t)
    variables["params"] = random_step(key, variables["params"], TRAINED * setting.schedule.rate(t))
    uniforms = draw_uniforms(key, variables["candidates"])
    out = switch(**variables, schedule=setting.schedule, scale=layer.scale, step=t, uniforms=uniforms)
    frozen = {KERNEL: round_stochastically(key, out.frozen[KERNEL])} if storage == STOCHASTIC else out.frozen
    return {"params": out.params, "frozen": frozen, "candidates": out.candidates}

  def point(variables, first):
    variables = jax.lax.fori_loop(first, first + every, step, variables)
    vectors = (variables["params"][name] for name in ADAPTER)
    return variables, (
      variables["candidates"]["cursor"],
      merge(load_kernel(variables["frozen"]), *vectors, layer.scale),
    )

  start = layer.init(seed, jnp.zeros((1, setting.size)))
  _, history = jax.jit(lambda start: jax.lax.scan(point, start, jnp.arange(points) * every))(start)
  return jax.tree.map(np.asarray, history)


def random_step(key, params, distance):
  """The LoRA vectors after a Gaussian step of `distance` standard deviations of each array."""
  keys = dict(zip(params, jax.random.split(key), strict=True))
  return {name: x + distance * jnp.std(x) * jax.random.normal(keys[name], x.shape) for name, x in params.items()}


def round_stochastically(key, kernel):
  """Stochastic rounding of float32 values to bfloat16 precision; unbiased, and exact for representable values."""
  noise = jax.random.bits(key, kernel.shape, jnp.uint16).astype(jnp.uint32)
  bits = jax.lax.bitcast_convert_type(kernel, jnp.uint32) + noise
  return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
