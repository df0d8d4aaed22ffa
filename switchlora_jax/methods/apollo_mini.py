"""APOLLO-Mini: APOLLO with a projection to rank 1 and one learning rate per matrix (arXiv 2412.05270, section 4.2).

It is `apollo` with rank = 1, apollo.scale_type = "tensor" and apollo.scale = √128, under the name that its authors use.
"""

from switchlora_jax.methods import apollo, full
from switchlora_jax.methods.base import Method

LEARNING_RATE, MIN_LR_RATIO, ACCEPTED = apollo.LEARNING_RATE, apollo.MIN_LR_RATIO, apollo.ACCEPTED
SETTINGS = ("apollo_mini", 1, "tensor")  # section of the config, rank, scale_type


def check(config):
  """Raise `UserError` if a setting of `config.apollo_mini` is invalid."""
  full.check(config)
  apollo.check_section(config, "apollo_mini")


def describe(config) -> list[str]:
  """The granularity of the scale factors, and the number of projections."""
  return apollo.describe_section(config, *SETTINGS)


def warnings(config) -> list[str]:
  """No warnings."""
  return []


def build(config) -> Method:
  """APOLLO with rank 1; it ignores `config.rank`."""
  return apollo.build_section(config, *SETTINGS)
