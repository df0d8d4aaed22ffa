"""SIGKILL at any time: the relaunch has the same result as the uninterrupted run, to the bit."""

import random
import time

import pytest
from fault_runs import assert_same_end, finish, last_step, saved_arrays, small_config, start


@pytest.mark.in_default_tests
def test_kills_at_random_steps_change_no_result(uninterrupted_run, tmp_path):
  """Case 1. Only the steps since the last save are lost."""
  folder, uninterrupted = uninterrupted_run
  moments, workdir = random.Random(0), tmp_path / "killed"
  for reach in sorted(moments.sample(range(2, 40), 3)):
    run = start(small_config(folder), workdir)
    run.wait_for_step(reach)
    run.kill()
  finish(small_config(folder), workdir)
  assert_same_end(workdir, uninterrupted)


def test_kills_at_random_times_change_no_result(tmp_path):
  """Case 1. Ten kills, alternately during set-up, restore or compilation, and during a step or a save.

  The times are scaled by those of an uninterrupted run, so that every kill hits a running process on any machine.
  """
  config, workdir, moments = small_config(tmp_path, steps=100, data__epochs=10), tmp_path / "killed", random.Random(1)
  for name in ("compiled", "whole"):  # the second run, like all later ones, uses the compilation cache
    began = time.monotonic()
    run = start(config, tmp_path / name)
    run.wait_for_step(1)
    first_step = time.monotonic()
    assert run.exit_code() == 0, run.output()
  until_first_step, per_step, before_a_step = 0.8 * (first_step - began), (time.monotonic() - first_step) / 100, 0
  for number in range(10):
    done, run = last_step(workdir), start(config, workdir)
    if number % 2:
      run.wait_for_step(done + 1)
    time.sleep(moments.uniform(0, 8 * per_step if number % 2 else until_first_step))
    run.kill()
    before_a_step += last_step(workdir) <= done
  assert 3 <= before_a_step <= 5, "about half of the kills must come before the first step"
  finish(config, workdir)
  assert_same_end(workdir, tmp_path / "whole")


def test_a_kill_while_vectors_are_frozen_changes_no_result(tmp_path):
  """Case 13. The restored checkpoint has vectors whose freeze timers are running."""
  config = small_config(tmp_path, switch__interval=8, switch__freeze_steps=4, switch__decay_point=0.9)
  workdir = tmp_path / "killed"
  finish(config, tmp_path / "whole")
  run = start(config, workdir)
  run.wait_for_step(18)
  run.kill()
  timers = [array for name, array in saved_arrays(workdir).items() if "timer" in name]
  left = {int(steps) for array in timers for steps in array.ravel()}
  assert left - {0}, f"no vector is frozen in the checkpoint: {left}"
  finish(config, workdir)
  assert_same_end(workdir, tmp_path / "whole")
