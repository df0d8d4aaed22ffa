"""SLTrain (Han et al. 2024, arXiv 2406.02214): a low-rank product plus a sparse matrix, both trained.

Each kernel of a block is W = s·B·A + S, without a base kernel. S has a share δ of nonzero elements, at positions that
are drawn uniformly at step 0 and never change. Adam trains A, B and the elements of S.

`sltrain.restart_every` adds the restarts of `methods.factored` (arXiv 2505.22922) to A and B; S and its moments stay.

State per kernel, in elements with p = r·(in + out) and k = δ·in·out: p + k weights, 2·(p + k) moments and k positions
of 4 bytes. Full rank has 3·in·out. In float32 with δ = 0.03, S takes 4/3·δ = 4% of the state of full rank.
"""

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.factored import SparseFactoredDense
from switchlora_jax.methods import factored, full
from switchlora_jax.methods.base import Method
from switchlora_jax.methods.optimizers import ADAM

LEARNING_RATE = 3e-3  # of the authors' example for 60M
MIN_LR_RATIO = 0.1
ACCEPTED = ADAM


def check(config):
  """Raise `UserError` if the rank, the scale, the density or the interval of restarts is invalid."""
  full.check(config)
  factored.check_factors(config)
  factored.check_settings(config, "sltrain")
  if not 0 < config.sltrain.density <= 1:
    raise UserError(
      f"sltrain.density (={config.sltrain.density}) must be greater than 0 and at most 1; set --config.sltrain.density"
    )


def describe(config) -> list[str]:
  """The number of restarts, if there are any."""
  return factored.describe_restarts(config, config.sltrain.restart_every)


def warnings(config) -> list[str]:
  """Warn of a warm start, which this method can only approximate."""
  kept = f"a product of rank {config.rank} and {config.sltrain.density:.1%} of the elements"
  return factored.warn_of_warm_start(config, kept)


def build(config) -> Method:
  """`SparseFactoredDense` layers and Adam."""
  return factored.build_layers(config, "sltrain", SparseFactoredDense, density=config.sltrain.density)
