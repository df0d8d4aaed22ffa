"""SIGTERM and SIGINT: the step is finished and saved, the same one on two processes, and nothing is lost."""

import signal
import time

from fault_runs import assert_same_end, finish, finish_pair, last_step, saved_steps, small_config, start, start_pair

from switchlora_jax.data import dataset
from switchlora_jax.errors import STOPPED
from switchlora_jax.training import trainer


def stopped_at(run) -> int:
  """Returns the step after which a signal stopped a run; nothing is written after its save."""
  assert run.exit_code() == STOPPED, run.output()
  step = saved_steps(run.workdir)[-1]
  assert step == last_step(run.workdir)
  return step


def test_a_signal_finishes_and_saves_the_step(uninterrupted_run, tmp_path):
  """Case 3. SIGTERM, then SIGINT to the relaunch, both between two scheduled checkpoints: nothing is lost."""
  folder, uninterrupted = uninterrupted_run
  config, workdir = small_config(folder, checkpoint_every=30), tmp_path / "stopped"
  for number, reach in ((signal.SIGTERM, 7), (signal.SIGINT, 22)):
    run = start(config, workdir)
    run.wait_for_step(reach)
    run.process.send_signal(number)
    step = stopped_at(run)
    assert reach <= step < 30
    assert f"stopped by {number.name} after step {step}, which is saved; the same command continues" in run.output()
    assert "Traceback" not in run.output()
  finish(config, workdir)
  assert_same_end(workdir, uninterrupted)


def slow_steps():
  """Steps take 0.2 s longer, so that the run lasts until its processes agree on the last step."""
  step = trainer.Run.step
  trainer.Run.step = lambda self: (time.sleep(0.2), step(self))


def slow_set_up():
  """Tokenising never ends."""
  dataset.open_dataset = lambda *_, **__: (print("tokenising", flush=True), time.sleep(600))


def test_sigterm_during_set_up_ends_both_processes(tmp_path):
  """Case 3. SIGTERM before the first step, to one of two: both exit with 75 at once; the same command starts again."""
  faults, workdir = ("test_signals:slow_set_up",) * 2, tmp_path / "pair"
  for receiver in (1, 0):
    pair = start_pair(small_config(tmp_path), workdir, faults=faults)
    pair[0].wait_for(lambda first=pair[0]: "tokenising" in first.stdout.read_text(), "set-up")
    pair[receiver].process.send_signal(signal.SIGTERM)
    assert [run.exit_code(20) for run in pair] == [STOPPED] * 2
    assert "stopped by SIGTERM during set-up; the same command starts again" in pair[receiver].output()
    assert f"stopped by SIGTERM to process {receiver} during set-up; the same" in pair[1 - receiver].output()


def test_a_signal_to_one_of_two_stops_both_after_the_same_step(uninterrupted_pair, tmp_path):
  """Case 4. SIGTERM to one process, then SIGINT to the other: both save the same step, and nothing is lost."""
  folder, uninterrupted = uninterrupted_pair
  config, workdir = small_config(folder, checkpoint_every=30), tmp_path / "pair"
  for number, receiver in ((signal.SIGTERM, 1), (signal.SIGINT, 0)):
    reach = last_step(workdir) + 3
    pair = start_pair(config, workdir, faults=("test_signals:slow_steps",) * 2)
    pair[0].wait_for_step(reach)
    pair[receiver].process.send_signal(number)
    step, _ = (stopped_at(run) for run in pair)
    assert f"stopped by {number.name} after step {step}, which is saved" in pair[receiver].output()
    assert f"stopped by {number.name} to process {receiver} after step {step}, which" in pair[1 - receiver].output()
  finish_pair(config, workdir)
  assert_same_end(workdir, uninterrupted)
