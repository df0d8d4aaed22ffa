"""SIGKILL: wherever it strikes, the relaunch ends bit by bit as the uninterrupted run."""

import random

import pytest
from runs import assert_same_end, finish, small, start


@pytest.mark.telling
def test_killed_at_random_moments(whole, tmp_path):
  """Case 1. Nothing but the steps since the last save is lost."""
  folder, uninterrupted = whole
  moments, workdir = random.Random(0), tmp_path / "killed"
  for reach in sorted(moments.sample(range(2, 40), 3)):
    run = start(small(folder), workdir)
    run.until(reach)
    run.process.kill()
    run.end()
  finish(small(folder), workdir)
  assert_same_end(workdir, uninterrupted)
