"""Full-rank training of all weights, with any optimizer of `config.optimizer`."""

from functools import partial

import flax.linen as nn

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import KERNEL_INIT
from switchlora_jax.methods.base import Method, dtypes
from switchlora_jax.methods.optimizers import OPTIMIZERS, make_optimizer
from switchlora_jax.methods.schedules import config_schedule

LEARNING_RATE = 1e-3  # section 4.1
MIN_LR_RATIO = 0.0
ACCEPTED = OPTIMIZERS


def check(config):
  """Raise `UserError` if the config sets a dtype for frozen kernels, which this method does not have."""
  if config.frozen_dtype not in (None, config.param_dtype):
    raise UserError(
      f"frozen_dtype (={config.frozen_dtype!r}) applies to the frozen kernels of layers with adapters, but "
      f"--config.method={config.method} has no frozen kernels; leave it unset, or use --config.method=lora, "
      f"switchlora or relora"
    )


def describe(config) -> list[str]:
  """No facts beyond those printed for every method."""
  return []


def warnings(config) -> list[str]:
  """No warnings."""
  return []


def build(config) -> Method:
  """`nn.Dense` layers and the optimizer of the config."""
  dense = partial(nn.Dense, use_bias=False, kernel_init=KERNEL_INIT, **dtypes(config))
  return Method(dense, make_optimizer(config), config_schedule(config))
