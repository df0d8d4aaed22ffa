"""What ends a run, and what is said of it: a hang, a lost process, one that failed; time passes as the tests say."""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from jax.errors import JaxRuntimeError
from paths import ROOT

from switchlora_jax.errors import HUNG, Stopped, UserError
from switchlora_jax.parallel import watchdog
from switchlora_jax.parallel.watchdog import GRACE, Watchdog

HANG, LOST = 100, 30


class Peers:
  """What a process hears: of each process the newest facts, until it falls silent."""

  def __init__(self, here: int, count: int):
    self.here, self.count, self.silent, self.mine = here, count, set(), {}
    self.said = {process: {"beat": 0, "marks": 7, "doing": f"step {process}"} for process in range(count)}

  def say(self, **facts):
    self.mine |= facts
    self.said[self.here] = self.said[self.here] | facts

  say_now = say

  def beat(self):
    for process in set(self.said) - self.silent:
      self.said[process] = self.said[process] | {"beat": self.said[process]["beat"] + 1}


def begun(here=0, count=1, hang=HANG):
  peers = Peers(here, count)
  dog = Watchdog(peers, hang, LOST)
  dog.begin()
  return peers, dog


def looks(peers, dog, seconds: int) -> str | None:
  """The first that it says within so many seconds, if anything."""
  for _ in range(seconds):
    peers.beat()
    if sentence := dog.look(1):
      return sentence
  return None


def test_a_run_that_goes_on_is_left_alone():
  peers, dog = begun(count=2)
  for step in range(20):
    dog.mark(f"step {step}")
    assert looks(peers, dog, HANG - 1) is None


def test_a_run_that_hangs_is_ended_with_its_stacks(capfd):
  peers, dog = begun()
  dog.mark("step 38, on the devices")
  sentence = looks(peers, dog, HANG + 3)
  assert re.fullmatch(
    r"process 0 hangs since \d\d:\d\d:\d\d at: step 38, on the devices; nothing went on for 100 s "
    r"\(--config.hang_seconds\); above is what each thread was doing; the same command .*continues from .*",
    sentence,
  )
  assert "test_a_run_that_hangs_is_ended_with_its_stacks" in capfd.readouterr().err


@pytest.mark.parametrize("here", [0, 1, 2])
def test_of_several_that_hang_the_one_behind_is_named(here):
  peers, dog = begun(here, 3)
  for process, marks in enumerate((9, 8, 9)):
    peers.said[process] = peers.said[process] | {"marks": marks}
  assert "furthest behind is process 1, at: " in looks(peers, dog, HANG + 3)


def test_zero_seconds_are_never():
  assert looks(*begun(hang=0), 10_000) is None


def test_set_up_may_take_its_time():
  peers = Peers(0, 1)
  assert looks(peers, Watchdog(peers, HANG, LOST), 10_000) is None


@pytest.mark.parametrize(("here", "silent"), [(0, 1), (1, 2), (2, 1), (1, 0)])
def test_a_process_that_says_nothing_more_is_lost(here, silent):
  peers, dog = begun(here, 3)
  assert looks(peers, dog, 50) is None
  peers.silent = {silent} if silent else {0, 1, 2}  # what any process says is heard through process 0
  assert looks(peers, dog, LOST - 2) is None
  assert looks(peers, dog, 5).startswith(
    f"process {silent} of 3 is lost: no sign of life for 30 s (--peer_timeout); it was last at: s"
  )


@pytest.mark.parametrize("here", [1, 2])
def test_where_process_0_does_not_answer_no_other_is_blamed(here):
  """Though what the other said last may be a little older."""
  peers, dog = begun(here, 3)
  peers.silent = {3 - here}
  assert looks(peers, dog, 3) is None
  peers.silent = {0, 1, 2}
  assert looks(peers, dog, LOST + 1).startswith("process 0 of 3 is lost")


def test_a_process_that_has_ended_is_not_missed():
  peers, dog = begun(0, 2)
  peers.said[1] = peers.said[1] | {"ended": True}
  peers.silent = {1}
  assert looks(peers, dog, HANG - 5) is None


def test_a_process_that_failed_ends_those_that_do_not_end_by_themselves():
  peers, dog = begun(0, 2)
  peers.said[1] = peers.said[1] | {"failed": "KeyError: 5", "ended": True}
  assert looks(peers, dog, int(GRACE)) is None
  assert looks(peers, dog, 2).startswith("process 1 has failed (KeyError: 5), see what it says; the same command")


def test_an_error_is_told_to_the_others_at_once():
  peers, dog = begun(1, 2)
  with pytest.raises(KeyError), dog.telling():
    raise KeyError(5)
  assert peers.mine["failed"] == "KeyError: 5"


def test_ctrl_c_during_set_up_is_told_to_the_others():
  peers, dog = begun(1, 2)
  with pytest.raises(KeyboardInterrupt), dog.telling():
    raise KeyboardInterrupt
  assert peers.mine["failed"].startswith("KeyboardInterrupt")


def test_a_process_that_failed_and_then_waits_for_others_says_why_it_failed(monkeypatch, capsys):
  """Its exception is not seen by anyone: it was on its way out, and waited for a save."""
  dog, codes = begun(1, 2)[1], []
  monkeypatch.setattr(watchdog.os, "_exit", codes.append)
  with pytest.raises(KeyError), dog.telling():
    raise KeyError(5)
  dog._end("process 0 of 2 is lost")
  assert codes == [HUNG]
  assert "error: KeyError: 5; and before it could end, process 0 of 2 is lost" in capsys.readouterr().err


def test_a_run_ends_also_where_nothing_can_be_printed(monkeypatch):
  codes = []
  monkeypatch.setattr(watchdog.os, "_exit", codes.append)
  with open("/dev/null") as unwritable:
    monkeypatch.setattr(sys, "stderr", unwritable)
    peers, dog = begun()
    dog._end(looks(peers, dog, HANG + 3))
  assert codes == [HUNG]


GLOO = JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")


def wrapped(error: Exception, cause: Exception) -> Exception:
  error.__cause__ = cause
  return error


@pytest.mark.parametrize("error", [GLOO, wrapped(UserError("step 5 could not be saved"), GLOO)])
def test_an_error_that_another_process_may_have_caused_waits_to_hear_which(error, monkeypatch, capsys):
  dog, slept = begun(1, 2)[1], []
  monkeypatch.setattr(watchdog, "time", SimpleNamespace(sleep=slept.append))
  with pytest.raises(type(error)), dog.telling(), dog.telling():
    raise error
  assert slept == [LOST + GRACE] and "waiting to hear which" in capsys.readouterr().err


@pytest.mark.parametrize(
  "error",
  [
    OSError(107, "Transport endpoint is not connected", "/mnt/socket"),
    UserError("reading failed with ConnectionResetError: Connection reset by peer"),
    JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
  ],
)
def test_an_error_of_a_file_or_of_this_process_alone_is_told_at_once(error, monkeypatch):
  monkeypatch.setattr(watchdog, "time", None)
  peers, dog = begun(1, 2)
  with pytest.raises(type(error)), dog.telling():
    raise error
  assert peers.mine["failed"].startswith(type(error).__name__)


def test_of_one_process_nobody_waits_to_hear(monkeypatch):
  monkeypatch.setattr(watchdog, "time", None)
  with pytest.raises(JaxRuntimeError), begun()[1].telling():
    raise GLOO


def test_a_run_that_was_told_to_stop_has_not_failed():
  peers, dog = begun(0, 2)
  with pytest.raises(Stopped), dog.telling():
    raise Stopped
  assert "failed" not in peers.mine


# --- real processes -------------------------------------------------------------------------------------------------

HANGS = """
import sys, time
from switchlora_jax.parallel.heartbeat import Peers
from switchlora_jax.parallel.watchdog import Watchdog
with Peers() as peers, Watchdog(peers, float(sys.argv[1]), 60) as dog:
  dog.begin()
  print("ready", flush=True)
  time.sleep(600)
"""


def hanging(seconds: int):
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  process = subprocess.Popen([sys.executable, "-c", HANGS, str(seconds)], cwd=ROOT, **pipes)
  assert process.stdout.readline() == "ready\n"
  return process


def test_a_process_ends_itself():
  process = hanging(1)
  _, error = process.communicate(timeout=300)
  assert process.returncode == HUNG
  assert "error: process 0 hangs since" in error and 'File "<string>", line 8 in <module>' in error


def test_a_process_that_was_stopped_and_goes_on_has_not_hung():
  process = hanging(6)
  time.sleep(1.5)  # it has looked once or twice
  os.kill(process.pid, signal.SIGSTOP)
  time.sleep(7)
  os.kill(process.pid, signal.SIGCONT)
  time.sleep(3)
  assert process.poll() is None
  process.kill()
  process.communicate()
