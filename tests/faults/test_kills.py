"""SIGKILL: wherever it strikes, the relaunch ends bit by bit as the uninterrupted run."""

import random
import time

import pytest
from hurt_runs import assert_same_end, finish, last_step, saved_arrays, small, start


@pytest.mark.telling
def test_killed_at_random_moments(whole, tmp_path):
  """Case 1. Nothing but the steps since the last save is lost."""
  folder, uninterrupted = whole
  moments, workdir = random.Random(0), tmp_path / "killed"
  for reach in sorted(moments.sample(range(2, 40), 3)):
    run = start(small(folder), workdir)
    run.until(reach)
    run.kill()
  finish(small(folder), workdir)
  assert_same_end(workdir, uninterrupted)


def test_killed_at_any_time(tmp_path):
  """Case 1. Ten kills: every other one in set-up, restore or compiling, the others in a step or a save.

  When, is drawn in the pace of an uninterrupted run, so that on any machine all of them strike a living process.
  """
  config, workdir, moments = small(tmp_path, steps=100, data__epochs=10), tmp_path / "killed", random.Random(1)
  for name in ("compiled", "whole"):  # the second finds what the first has compiled, as all that follow
    began = time.monotonic()
    run = start(config, tmp_path / name)
    run.until(1)
    begun = time.monotonic()
    assert run.end() == 0, run.said()
  to_begin, to_step, before_a_step = 0.8 * (begun - began), (time.monotonic() - begun) / 100, 0
  for number in range(10):
    done, run = last_step(workdir), start(config, workdir)
    if number % 2:
      run.until(done + 1)
    time.sleep(moments.uniform(0, 8 * to_step if number % 2 else to_begin))
    run.kill()
    before_a_step += last_step(workdir) <= done
  assert 3 <= before_a_step <= 5, "half of them were to strike before the first step"
  finish(config, workdir)
  assert_same_end(workdir, tmp_path / "whole")


def test_killed_while_vectors_are_frozen(tmp_path):
  """Case 13. What continues is a state some of whose vectors are frozen, each for as many steps as it has left."""
  config = small(tmp_path, switch__interval=8, switch__freeze_steps=4, switch__decay_point=0.9)
  workdir = tmp_path / "killed"
  finish(config, tmp_path / "whole")
  run = start(config, workdir)
  run.until(18)
  run.kill()
  timers = [array for name, array in saved_arrays(workdir).items() if "timer" in name]
  left = {int(steps) for array in timers for steps in array.ravel()}
  assert left - {0}, f"no vector is frozen in the checkpoint: {left}"
  finish(config, workdir)
  assert_same_end(workdir, tmp_path / "whole")
