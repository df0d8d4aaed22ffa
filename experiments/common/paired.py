"""A paired comparison of two methods over seeds."""

import math
import statistics
from typing import NamedTuple

from scipy.special import stdtr

LEAST_SEEDS = 3


class PairedDifference(NamedTuple):
  """The difference of two methods' losses over the seeds that both were trained with.

  Attributes:
    mean: mean of loss - reference, in nats per token: the logarithm of the ratio of the perplexities.
    standard_error: of the mean.
    p: of the two-sided paired t-test; None if all differences are equal.
    seeds: number of pairs.
  """

  mean: float
  standard_error: float
  p: float | None
  seeds: int


def paired_difference(losses: dict[int, float | None], reference: dict[int, float | None]) -> PairedDifference | None:
  """Compare {seed: loss} of a method with that of a reference.

  Returns None with fewer than `LEAST_SEEDS` common seeds. Also None if one of them diverged (None): without that pair
  the difference would favour the method that diverged.
  """
  common = sorted(losses.keys() & reference.keys())
  if len(common) < LEAST_SEEDS or any(found[seed] is None for found in (losses, reference) for seed in common):
    return None
  differences = [losses[seed] - reference[seed] for seed in common]
  mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(common))
  p = float(2 * stdtr(len(common) - 1, -abs(mean / error))) if error else None
  return PairedDifference(mean, error, p, len(common))
