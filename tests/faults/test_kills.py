"""SIGKILL: wherever it strikes, the relaunch ends bit by bit as the uninterrupted run."""

import random
import time

import pytest
from hurt_runs import assert_same_end, finish, saved_arrays, small, start


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


def test_killed_at_any_time(whole, tmp_path):
  """Case 1. Ten kills, of which each strikes at a random time after the start: set-up, compiling, a step, a save."""
  folder, uninterrupted = whole
  moments, workdir = random.Random(1), tmp_path / "killed"
  for _ in range(10):
    run = start(small(folder), workdir)
    time.sleep(moments.uniform(1, 15))
    run.process.kill()
    run.end()
  finish(small(folder), workdir)
  assert_same_end(workdir, uninterrupted)


def test_killed_while_vectors_are_frozen(tmp_path):
  """Case 13. What continues is a state some of whose vectors are frozen, each for as many steps as it has left."""
  config = small(tmp_path, switch__interval=8, switch__freeze_steps=4, switch__decay_point=0.9)
  workdir = tmp_path / "killed"
  finish(config, tmp_path / "whole")
  run = start(config, workdir)
  run.until(18)
  run.process.kill()
  run.end()
  timers = [array for name, array in saved_arrays(workdir).items() if "timer" in name]
  left = {int(steps) for array in timers for steps in array.ravel()}
  assert left - {0}, f"no vector is frozen in the checkpoint: {left}"
  finish(config, workdir)
  assert_same_end(workdir, tmp_path / "whole")
