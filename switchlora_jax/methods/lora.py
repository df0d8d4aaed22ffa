"""LoRA from scratch: adapters are trained, the base weights stay as they were drawn.

The paper's baseline: SwitchLoRA's layer and initialisation (section 4.1), without switching.
"""

from functools import partial

from switchlora_jax.dense import INITS, LoRADense, lora_vectors
from switchlora_jax.errors import UserError
from switchlora_jax.methods.base import Method, dtypes
from switchlora_jax.optimizer import vector_adam

LEARNING_RATE = 1e-2  # section 4.1


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
  return partial(kind, rank=config.rank, adapter_init=config.switch.init, **dtypes(config))


def optimizer(config):
  """From a schedule to Adam with one count per LoRA vector."""
  return partial(vector_adam, vectors=lora_vectors, count_per_element=config.count_per_element)


def describe(config) -> list[str]:
  """Nothing beyond the sizes that every method has."""
  return []


def build(config) -> Method:
  """Adapted layers, nothing between the gradients and the optimizer."""
  return Method(layer(config), optimizer(config))
