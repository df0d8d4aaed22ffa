"""Clocks that jump: file names, logs and speeds have them, what a run computes has not."""

import itertools
import time

from runs import assert_same_end, small, start

DAY = 86_400


def jump():
  """Every look at the wall clock finds another day: now, yesterday, tomorrow, the beginning of time.

  The monotonic clock stands still between most looks, as a coarse one does; backwards it never goes.
  """
  real, nanoseconds, monotonic, looks = time.time, time.time_ns, time.monotonic, itertools.count()
  away = itertools.cycle((0, -DAY, DAY, -1e9))
  stands = [monotonic()]

  def coarse():
    if next(looks) % 8 == 0:
      stands[0] = monotonic()
    return stands[0]

  time.time = lambda: real() + next(away)
  time.time_ns = lambda: nanoseconds() + int(next(away)) * 10**9
  time.monotonic = coarse


def test_clocks_that_jump(whole, tmp_path):
  """Case 16. The run ends as the uninterrupted one, in two parts, with a jump between them too."""
  folder, uninterrupted = whole
  run = start(small(folder), tmp_path / "run", fault="test_clocks:jump")
  run.until(23)
  run.process.kill()
  run.end()
  run = start(small(folder), tmp_path / "run", fault="test_clocks:jump")
  assert run.end() == 0, run.said()
  assert "Traceback" not in run.said()
  assert_same_end(tmp_path / "run", uninterrupted)
