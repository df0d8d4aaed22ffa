"""A run continues with another number of micro-batches per step, as with another sharding."""

import shutil

import numpy as np
import pytest
from short_runs import lines, train

pytestmark = pytest.mark.two_linear_layers

OFTEN = dict(switch__decay_to=0.9, switch__decay_point=0.9)  # the run switches until its last step
SHAPE = dict(method="switchlora", checkpoint_every=6) | OFTEN


@pytest.mark.slow
def test_a_run_continues_with_other_micro_batches(folder):
  """The global batch is the same, so that only the order of sums changes."""
  whole = train(folder, "whole", **SHAPE)
  again = folder / "again"
  shutil.copytree(whole.workdir, again)
  shutil.rmtree(again / "checkpoints" / "12")
  continued = train(folder, "again", **SHAPE, accumulation=2)
  assert continued.outcome.first_step == 6
  expected, found = lines(whole), lines(continued)
  assert [row["switched"] for row in found] == [row["switched"] for row in expected]
  assert sum(row["switched"] for row in found[6:]) > 0
  losses, expected_losses = ([row["loss"] for row in rows] for rows in (found, expected))
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  assert losses[6:] != expected_losses[6:], "accumulation was not changed"
