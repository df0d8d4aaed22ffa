"""Two processes of which one is killed, suspended or hangs: the other ends within a bounded time and names it."""

import re
import signal
import time

from fault_runs import (
  assert_same_end,
  assert_same_numbers,
  finish,
  finish_pair,
  saved_steps,
  small_config,
  start,
  start_pair,
)

from switchlora_jax.data import loader
from switchlora_jax.errors import HUNG, STOPPED
from switchlora_jax.parallel.supervision import GRACE, Supervisor
from switchlora_jax.runs import checkpoint

PEER_TIMEOUT = 8  # seconds of --peer_timeout
HANG = 10  # seconds of --config.hang_seconds


def end_by_supervision(run, within: float) -> str:
  """Waits until supervision ends the process, at most `within` seconds; returns its output."""
  began = time.monotonic()
  assert run.exit_code(within) == HUNG, run.output()
  print(f"ended after {time.monotonic() - began:.1f} s")
  assert "the same command on all processes continues from the last checkpoint" in run.output()
  return run.output()


def lose_each_process(number: signal.Signals, uninterrupted_pair, workdir):
  """Sends a signal to process 1, and to process 0 of the relaunch; the next relaunch ends as the uninterrupted run."""
  folder, uninterrupted = uninterrupted_pair
  for victim, reach in ((1, 12), (0, 27)):
    pair = start_pair(small_config(folder), workdir, f"--peer_timeout={PEER_TIMEOUT}")
    pair[0].wait_for_step(reach)
    pair[victim].process.send_signal(number)
    if victim == 0 and number == signal.SIGKILL:  # the connection breaks, and JAX aborts at once
      assert pair[1].exit_code(PEER_TIMEOUT) == -signal.SIGABRT
      assert "This most likely indicates that another task died" in pair[1].output()
    else:
      output = end_by_supervision(pair[1 - victim], PEER_TIMEOUT + 2 * GRACE + 20)
      assert f"process {victim} of 2 is lost: no heartbeat for {PEER_TIMEOUT} s (--peer_timeout); it was last" in output
    assert saved_steps(workdir)[-1] >= reach - 7  # the save of the last five may have been in progress
    pair[victim].kill()  # a suspended one still holds the lock of the directory
  finish_pair(small_config(folder), workdir)
  assert_same_end(workdir, uninterrupted)


def test_a_killed_process_ends_the_other(uninterrupted_pair, tmp_path):
  """Case 5. SIGKILL to one of two: the other ends; the relaunch repeats the steps since the last save."""
  lose_each_process(signal.SIGKILL, uninterrupted_pair, tmp_path / "killed")


def test_a_suspended_process_ends_the_other(uninterrupted_pair, tmp_path):
  """Case 6. SIGSTOP to one of two: the other ends and names it; once it is killed too, the relaunch continues."""
  lose_each_process(signal.SIGSTOP, uninterrupted_pair, tmp_path / "stopped")


def shorten_hang_seconds():
  """Sets `hang_seconds` to HANG after the first steps, which compile."""

  def mark_and_shorten(self, doing):
    if doing.startswith("step 10,"):
      self._hang_seconds = HANG
    mark(self, doing)

  mark, Supervisor.mark = Supervisor.mark, mark_and_shorten


def block_reader_at(step: str):
  """`shorten_hang_seconds`, and the reader of batches blocks after a number of steps."""
  shorten_hang_seconds()
  make_batch_fn = loader.make_batch_fn

  def blocked(train, config):
    batch_of = make_batch_fn(train, config)
    return lambda done: time.sleep(3600) if done == int(step) else batch_of(done)

  loader.make_batch_fn = blocked


def test_a_hanging_process_ends_both(uninterrupted_run, tmp_path):
  """Case 6. One of two waits for a batch forever: both end, and name their position and the process behind."""
  faults = ("test_lost_peers:shorten_hang_seconds", "test_lost_peers:block_reader_at=12")
  pair = start_pair(small_config(uninterrupted_run[0]), tmp_path / "hangs", faults=faults)
  pair[0].wait_for_step(11)
  for run, position in zip(pair, ("step 13, on the devices", "step 13, reading its batch"), strict=True):
    output = end_by_supervision(run, HANG + 2 * GRACE + 20)
    assert f"at: {position}; no progress for {HANG} s (--config.hang_seconds)" in output
    assert "furthest behind is process 1, at: step 13, reading its batch; the stacks" in output
  assert "in <lambda>" in output, "no stack of the main thread"


def never_restore():
  """Makes a restore block."""
  checkpoint.Checkpoints.restore = lambda *_: time.sleep(3600)


def test_a_hanging_restore_ends_the_run(tmp_path):
  """Case 6. `hang_seconds` limits a restore like a step."""
  run = start(
    small_config(tmp_path), tmp_path / "hangs", f"--config.hang_seconds={HANG}", fault="test_lost_peers:never_restore"
  )
  run.wait_for(lambda: (tmp_path / "hangs" / "config.json").exists(), "training")
  output = end_by_supervision(run, HANG + 30)
  assert f"at: restoring the newest checkpoint; no progress for {HANG} s (--config.hang_seconds)" in output


def test_a_run_continues_on_other_devices_and_processes(uninterrupted_run, tmp_path):
  """Case 14. One device, two processes, four devices, two, one: the same result, up to the order of sums."""
  folder, uninterrupted = uninterrupted_run
  workdir = tmp_path / "moves"
  alone = lambda devices: [start(small_config(folder), workdir, devices=devices)]
  pair = lambda: start_pair(small_config(folder), workdir)
  for begin, reach in ((lambda: alone(1), 6), (pair, 14), (lambda: alone(4), 22), (lambda: alone(2), 30)):
    runs = begin()
    runs[0].wait_for_step(reach)
    runs[0].process.terminate()
    assert [run.exit_code() for run in runs] == [STOPPED] * len(runs), runs[0].output()
  finish(small_config(folder), workdir)
  assert_same_numbers(workdir, uninterrupted)


def test_a_disk_that_is_full_for_one_of_two_processes_ends_both(tmp_path):
  """Case 7. The process that cannot write prints the reason; both end before the next save."""
  faults = (None, "test_checkpoint_faults:fill_the_disk=10,1000")
  halves = small_config(tmp_path, **{"sharding.fsdp": 2})  # many arrays fail, each in a thread of its own
  pair = start_pair(halves, tmp_path / "pair", f"--peer_timeout={PEER_TIMEOUT}", faults=faults)
  codes = [run.exit_code() for run in pair]
  assert 0 not in codes
  assert re.search(
    "error: the checkpoint of step 10 could not be saved in .*File too large; that of step 5 is complete",
    pair[1].output(),
  ), pair[1].output()
  assert "Traceback" not in pair[1].output()
  assert saved_steps(tmp_path / "pair") == [5]
