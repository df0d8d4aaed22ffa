"""Clocks that jump: they affect file names, logs and speeds, but no result of a run."""

import itertools
import time

from hurt_runs import assert_same_end, finish, small, start

DAY = 86_400


def jump():
  """The wall clock jumps back by a day at every 50th reading, and once, at the 120th, ahead by a quarter of an hour.

  (More than 20 minutes ahead within one save would end that save: orbax measures its timeout by this clock.)
  The monotonic clock stands still between most readings, as a coarse one does; it never goes back.
  """
  walls, monos = itertools.count(), itertools.count()
  real, nanoseconds, monotonic = time.time, time.time_ns, time.monotonic
  away, stands = [0], [monotonic()]

  def wall():
    look = next(walls)
    away[0] += 900 * (look == 120) - DAY * (look % 50 == 49)
    return away[0]

  def coarse():
    if next(monos) % 8 == 0:
      stands[0] = monotonic()
    return stands[0]

  time.time = lambda: real() + wall()
  time.time_ns = lambda: nanoseconds() + wall() * 10**9
  time.monotonic = coarse


def test_clocks_that_jump(whole, tmp_path):
  """Case 16. The run ends as the uninterrupted one, in two parts, with a jump between them too."""
  folder, uninterrupted = whole
  run = start(small(folder), tmp_path / "run", fault="test_clocks:jump")
  run.until(23)
  run.kill()
  run = finish(small(folder), tmp_path / "run", fault="test_clocks:jump")
  assert "Traceback" not in run.said()
  assert_same_end(tmp_path / "run", uninterrupted)
