"""Clocks that jump affect file names, logs and speeds, but no result of a run."""

import itertools
import time

from fault_runs import assert_same_end, finish, small_config, start

DAY = 86_400


def jumping_clocks():
  """The wall clock jumps back by a day at every 50th reading, and ahead by 15 minutes at the 120th.

  A jump of more than 20 minutes ahead during a save would end it, since orbax measures its timeout by this clock.
  The monotonic clock advances only at every 8th reading, like a coarse clock.
  """
  wall_reads, monotonic_reads = itertools.count(), itertools.count()
  real, nanoseconds, monotonic = time.time, time.time_ns, time.monotonic
  offset, coarse_time = [0], [monotonic()]

  def wall():
    read = next(wall_reads)
    offset[0] += 900 * (read == 120) - DAY * (read % 50 == 49)
    return offset[0]

  def coarse():
    if next(monotonic_reads) % 8 == 0:
      coarse_time[0] = monotonic()
    return coarse_time[0]

  time.time = lambda: real() + wall()
  time.time_ns = lambda: nanoseconds() + wall() * 10**9
  time.monotonic = coarse


def test_jumping_clocks_change_no_result(uninterrupted_run, tmp_path):
  """Case 16. The run is killed and relaunched; its result is that of the uninterrupted run."""
  folder, uninterrupted = uninterrupted_run
  run = start(small_config(folder), tmp_path / "run", fault="test_clocks:jumping_clocks")
  run.wait_for_step(23)
  run.kill()
  run = finish(small_config(folder), tmp_path / "run", fault="test_clocks:jumping_clocks")
  assert "Traceback" not in run.output()
  assert_same_end(tmp_path / "run", uninterrupted)
