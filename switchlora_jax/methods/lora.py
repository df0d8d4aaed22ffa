"""LoRA from scratch: adapters are trained, the base weights stay as they were drawn.

The paper's baseline: SwitchLoRA's layer and initialisation (section 4.1), without switching.
"""

from functools import partial

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import INITS, LoRADense, adapter_scale, lora_vectors
from switchlora_jax.lowrank.optimizer import scale_by_vector_adam
from switchlora_jax.methods.base import Method, adapter_dtypes, cosine

LEARNING_RATE = 1e-2  # section 4.1
MIN_LR_RATIO = 0.0


def check(config):
  """Raise `UserError` if the rank or the initialisation makes no sense."""
  if config.rank < 1:
    raise UserError(f"rank (={config.rank}) must be at least 1; set --config.rank or use --config.method=full")
  if config.switch.init not in INITS:
    raise UserError(
      f"switch.init (={config.switch.init!r}) must be one of {', '.join(INITS)}; set --config.switch.init"
    )


def layer(config, kind=LoRADense):
  """The factory of adapted layers for a config."""
  return partial(kind, rank=config.rank, adapter_init=config.switch.init, **adapter_dtypes(config))


def describe(config) -> list[str]:
  """Nothing beyond the sizes that every method has."""
  return []


def build(config, kind=LoRADense) -> Method:
  """Adapted layers, nothing between the gradients and the optimizer."""
  schedule = cosine(config, floor=config.min_lr_ratio)
  adam = scale_by_vector_adam(vectors=lora_vectors, count_per_element=config.count_per_element)
  return Method(layer(config, kind), adam, schedule, adapter_scale(config.rank))
