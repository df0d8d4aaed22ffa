"""Full-rank training: every weight is trained by Adam."""

from functools import partial

import flax.linen as nn

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import KERNEL_INIT
from switchlora_jax.lowrank.optimizer import scale_by_vector_adam
from switchlora_jax.methods.base import Method, cosine, dtypes

LEARNING_RATE = 1e-3  # section 4.1
MIN_LR_RATIO = 0.0


def check(config):
  """Raise `UserError` if kernels shall be frozen; the rank is not used."""
  if config.frozen_dtype not in (None, config.param_dtype):
    raise UserError(
      f"frozen_dtype (={config.frozen_dtype!r}) is for the frozen kernels below adapters, and --config.method="
      f"{config.method} trains its kernels; leave it unset, or use --config.method=lora, switchlora or relora"
    )


def describe(config) -> list[str]:
  """Nothing beyond the sizes that every method has."""
  return []


def build(config) -> Method:
  """Plain linear layers and plain Adam."""
  dense = partial(nn.Dense, use_bias=False, kernel_init=KERNEL_INIT, **dtypes(config))
  return Method(dense, scale_by_vector_adam(), cosine(config, floor=config.min_lr_ratio))
