"""Which cases of a test are left to `make slow`, so that `make test` stays short."""

import pytest


def slowly(cases, quick):
  """Parameters of a test: the cases, of which those that are not `quick` are left to `make slow`.

  Raises:
    AssertionError: a quick case is none of them.
  """
  cases = list(cases)
  assert set(quick) <= set(cases), f"{set(quick) - set(cases)} are no cases"
  return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
