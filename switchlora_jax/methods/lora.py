"""LoRA from scratch: trainable adapters on randomly initialised base kernels, which stay frozen.

This is the paper's baseline, with the layers and the initialisation of SwitchLoRA (section 4.1) and without switching.
"""

from functools import partial

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import INITS, LoRADense, adapter_scale, lora_vectors
from switchlora_jax.methods.base import Method, adapter_dtypes
from switchlora_jax.methods.optimizers import OPTIMIZERS, make_optimizer
from switchlora_jax.methods.schedules import config_schedule
from switchlora_jax.models.architecture import layers_of_full_rank

LEARNING_RATE = 1e-2  # section 4.1
MIN_LR_RATIO = 0.0
ACCEPTED = OPTIMIZERS


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
  """Warn of layers whose adapters can express any kernel."""
  if not (layers := layers_of_full_rank(config.model, config.rank)):
    return []
  return [
    f"the adapters of {layers} have more parameters than their kernels, whose min(in, out) is at most the rank "
    f"(={config.rank}); lower --config.rank"
  ]


def build(config, kind=LoRADense) -> Method:
  """Layers with adapters and the optimizer of the config; the step counts of Adam are per LoRA vector."""
  optimizer = make_optimizer(config, lora_vectors)
  return Method(layer(config, kind), optimizer, config_schedule(config), adapter_scale(config.rank))
