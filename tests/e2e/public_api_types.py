"""A program of a user of the public API, for the type checker (`make lint`). No test runs it.

An error that mypy must find is marked as ignored: an ignore without its error is an error itself.
"""

from typing import assert_type

import jax
import optax

from switchlora_jax import LoRADense, SwitchLoRADense, SwitchSchedule, draw_uniforms, lora_vectors, switch, vector_adam


def use(x: jax.Array, key: jax.Array):
  """Layer, optimizer and switch, once as they are meant and once with a wrong argument each."""
  layer = SwitchLoRADense(features=48, rank=8)
  assert_type(layer.scale, float)
  variables = layer.init(key, x)
  schedule = SwitchSchedule(interval=2, freeze_steps=1, total_steps=100)
  transformation: optax.GradientTransformationExtraArgs = vector_adam(1e-2, vectors=lora_vectors)
  transformation.init(variables["params"])
  uniforms = draw_uniforms(key, variables["candidates"])
  params, frozen, candidates = (variables[name] for name in ("params", "frozen", "candidates"))
  switched = switch(params, frozen, candidates, schedule=schedule, scale=layer.scale, step=0, uniforms=uniforms)
  assert_type(switched.count, jax.Array)

  LoRADense(features=48, rank="8")  # type: ignore[arg-type]
  LoRADense(features=48)  # type: ignore[call-arg]
  SwitchSchedule(interval=2, freeze_steps=1, steps=100)  # type: ignore[call-arg]
  vector_adam(vectors=lora_vectors)  # type: ignore[call-arg]
  switch(params, frozen, candidates, schedule=schedule)  # type: ignore[call-arg]
  return switched.param  # type: ignore[attr-defined]
