"""LoRA from scratch: trainable adapters on randomly initialised base kernels, which stay frozen.

This is the paper's baseline, with the layers and the initialisation of SwitchLoRA (section 4.1) and without switching.
"""

from functools import partial

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import INITS, LoRADense, adapter_scale, lora_vectors
from switchlora_jax.lowrank.optimizer import scale_by_vector_adam
from switchlora_jax.methods.base import Method, adapter_dtypes
from switchlora_jax.methods.schedules import config_schedule

LEARNING_RATE = 1e-2  # section 4.1
MIN_LR_RATIO = 0.0


def check(config):
  """Raise `UserError` if the rank is below 1 or the initialisation is unknown."""
  if config.rank < 1:
    raise UserError(f"rank (={config.rank}) must be at least 1; set --config.rank or use --config.method=full")
  if config.switch.init not in INITS:
    raise UserError(
      f"switch.init (={config.switch.init!r}) must be one of {', '.join(INITS)}; set --config.switch.init"
    )


def layer(config, kind=LoRADense):
  """The factory of layers with adapters."""
  return partial(kind, rank=config.rank, adapter_init=config.switch.init, **adapter_dtypes(config))


def describe(config) -> list[str]:
  """No facts beyond those printed for every method."""
  return []


def warnings(config) -> list[str]:
  """No warnings."""
  return []


def build(config, kind=LoRADense) -> Method:
  """Layers with adapters and Adam, whose step counts are per LoRA vector."""
  adam = scale_by_vector_adam(vectors=lora_vectors, count_per_element=config.count_per_element)
  return Method(layer(config, kind), adam, config_schedule(config), adapter_scale(config.rank))
