"""The paired t-test against SciPy and numbers by hand."""

import numpy as np
import pytest
from scipy import stats

from experiments.common.paired import paired_difference


def test_against_scipy():
  draws = np.random.default_rng(0).normal(size=(2, 5)) * 0.01 + [[3.0], [3.01]]
  ours = paired_difference(dict(enumerate(draws[0])), dict(enumerate(draws[1])))
  theirs = stats.ttest_rel(*draws)
  assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9) and ours.seeds == 5
  assert ours.mean / ours.standard_error == pytest.approx(theirs.statistic)


def test_numbers_by_hand():
  """Differences 1, 2, 3: mean 2, standard error 1/√3, t = 2√3, with two degrees of freedom p = 1 - t/√(t² + 2)."""
  found = paired_difference({0: 4.0, 1: 6.0, 2: 5.0}, {0: 3.0, 1: 4.0, 2: 2.0})
  assert (found.mean, found.standard_error) == pytest.approx((2, 3**-0.5))
  assert found.p == pytest.approx(1 - np.sqrt(12 / 14))


def test_seeds_are_paired_by_number_and_others_are_left_out():
  reference = {0: 3.0, 1: 4.0, 2: 2.0, 7: 100.0}
  assert paired_difference({2: 5.0, 1: 6.0, 0: 4.0, 5: 0.0}, reference).mean == pytest.approx(2)


def test_too_few_or_diverged_seeds_give_none_and_equal_differences_no_p():
  assert paired_difference({0: 1.0, 1: 1.1}, {0: 1.0, 1: 1.2}) is None
  assert paired_difference({0: 1.0, 1: 1.1, 2: 1.0}, {0: 1.0, 1: 1.2, 3: 1.0}) is None
  for diverged in ({0: 1.0, 1: 1.1, 2: 1.0, 3: None}, {0: None, 1: 1.1, 2: 1.0, 3: 1.0}):
    assert paired_difference(diverged, dict.fromkeys(range(4), 1.0)) is None
    assert paired_difference(dict.fromkeys(range(4), 1.0), diverged) is None
  equal = paired_difference(dict.fromkeys(range(3), 1.5), dict.fromkeys(range(3), 1.0))
  assert (equal.mean, equal.standard_error, equal.p) == (0.5, 0.0, None)
