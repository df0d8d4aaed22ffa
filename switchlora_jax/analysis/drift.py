"""How far base kernels drift while vectors are switched, by how they are stored: a study of one layer.

The very layer and the very `switch` of training; in place of gradients, every LoRA vector takes a small random
step before each switch. All storages see the same vectors, so what tells their weights apart is rounding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switchlora_jax.lowrank.kernel_storage import KERNEL, load_kernel
from switchlora_jax.lowrank.layers import ADAPTER, SwitchLoRADense, merge
from switchlora_jax.lowrank.spares import draw_uniforms
from switchlora_jax.lowrank.switching import SwitchSchedule, switch

TRAINED = 0.01  # how far a vector moves in a step, relative to its size; it slows down as switching does
EXACT, AT_RANDOM = "float32", "bfloat16, rounded at random"
STORED = {  # attributes of the layer
  EXACT: dict(),
  "bfloat16": dict(frozen_dtype=jnp.bfloat16, kernel_residual=False),
  AT_RANDOM: dict(),
  "bfloat16 + int8 tail": dict(frozen_dtype=jnp.bfloat16),
}


class Setting(NamedTuple):
  """A layer [size, size] of some rank, when its vectors are switched, and the steps to look at."""

  size: int
  rank: int
  schedule: SwitchSchedule
  steps: int


def drifts(setting: Setting, points: int) -> dict[str, list[float]]:
  """After each of so many equal parts of the steps: vectors switched a side, and the drift of each storage.

  A drift is ‖W - W₃₂‖/‖W₃₂‖ (Frobenius) of the weight in force, W = kernel + s·AᵀB, W₃₂ with a float32 kernel.
  """
  switched, exact = weights_in_force(setting, EXACT, points)
  far = lambda weights: np.linalg.norm(weights - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
  others = {name: weights_in_force(setting, name, points)[1] for name in STORED if name != EXACT}
  return {"switched": switched.tolist()} | {name: far(weights).tolist() for name, weights in others.items()}


def weights_in_force(setting: Setting, stored: str, points: int) -> tuple[np.ndarray, np.ndarray]:
  """Vectors switched a side [points] and the weight in force [points, size, size], in float32."""
  layer = SwitchLoRADense(setting.size, setting.rank, **STORED[stored])
  seed, every = jax.random.key(0), setting.steps // points

  def step(t, variables):
    key = jax.random.fold_in(seed, t)
    variables["params"] = trained(key, variables["params"], TRAINED * setting.schedule.rate(t))
    uniforms = draw_uniforms(key, variables["candidates"])
    out = switch(**variables, schedule=setting.schedule, scale=layer.scale, step=t, uniforms=uniforms)
    frozen = {KERNEL: rounded_at_random(key, out.frozen[KERNEL])} if stored == AT_RANDOM else out.frozen
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


def trained(key, params, distance):
  """The LoRA vectors after a random step that is so long, relative to their size."""
  keys = dict(zip(params, jax.random.split(key), strict=True))
  return {name: x + distance * jnp.std(x) * jax.random.normal(keys[name], x.shape) for name, x in params.items()}


def rounded_at_random(key, kernel):
  """Float32 values rounded up or down to bfloat16 ones so that the mean is right; those that are stay."""
  noise = jax.random.bits(key, kernel.shape, jnp.uint16).astype(jnp.uint32)
  bits = jax.lax.bitcast_convert_type(kernel, jnp.uint32) + noise
  return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
