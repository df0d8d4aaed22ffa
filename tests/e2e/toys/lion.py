"""Lion (Chen et al. 2023, arXiv:2302.06675): full-rank training with an optimizer from Optax.

The toy method of CONTRIBUTING.md.
"""

import optax

from switchlora_jax.errors import UserError
from switchlora_jax.methods import full
from switchlora_jax.methods.base import Method
from switchlora_jax.methods.optimizers import ADAM

LEARNING_RATE = 3e-4
MIN_LR_RATIO = 0.0
ACCEPTED = ADAM

describe, warnings = full.describe, full.warnings


def check(config):
  """Raises `UserError` unless the decay rates are in [0, 1)."""
  full.check(config)
  for key in ("b1", "b2"):
    if not 0 <= config.lion[key] < 1:
      raise UserError(f"lion.{key} (={config.lion[key]}) must be in [0, 1); set --config.lion.{key}")


def build(config) -> Method:
  """The layers and the schedule of full-rank training, with another optimizer."""
  return full.build(config)._replace(optimizer=optax.scale_by_lion(config.lion.b1, config.lion.b2))
