"""AdaBelief (Zhuang et al. 2020, arXiv 2010.07468): full-rank training with another optimizer from Optax.

The toy method of CONTRIBUTING.md.
"""

import optax

from switchlora_jax.errors import UserError
from switchlora_jax.methods import full
from switchlora_jax.methods.base import Method
from switchlora_jax.methods.optimizers import Coefficients

LEARNING_RATE = 1e-3
MIN_LR_RATIO = 0.0
ACCEPTED = {"adam": Coefficients(eps=1e-16)}  # of its own moments

describe, warnings = full.describe, full.warnings


def check(config):
  """Raises `UserError` unless `adabelief.eps_root` is at least 0."""
  full.check(config)
  if not config.adabelief.eps_root >= 0:
    raise UserError(
      f"adabelief.eps_root (={config.adabelief.eps_root}) must not be negative; set --config.adabelief.eps_root"
    )


def build(config) -> Method:
  """The layers and the schedule of full-rank training, with another optimizer."""
  chosen = config.optimizer
  belief = optax.scale_by_belief(chosen.b1, chosen.b2, chosen.eps, config.adabelief.eps_root)
  return full.build(config)._replace(optimizer=belief)
