"""Told to stop: the step that all agree on, whoever is told and wherever each stands; signals, in real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from switchlora_jax.errors import STOPPED
from switchlora_jax.parallel import preemption
from switchlora_jax.parallel.heartbeat import BEAT, Peers
from switchlora_jax.parallel.preemption import ONE, PARENT, Preemption


class Told:
  """One process of several, whose posts are handed on by `share`; its main thread is the test."""

  def __init__(self, process: int, count: int):
    self.here, self.count, self.facts, self.hear = process, count, {}, None
    self.preemption = Preemption(self)

  def listen(self, hear):
    self.hear = hear

  def say_now(self, **facts):
    self.facts |= facts


def share(processes, readers):
  """Let these processes hear what all have said."""
  said = {process.here: dict(process.facts) for process in processes}
  for process in readers:
    process.hear(said)


def begun(count: int, start: int):
  processes = [Told(process, count) for process in range(count)]
  for process in processes:
    process.preemption._asked, process.preemption._begun = start, True  # `begin` without its handler
  return processes


@given(st.data())
def test_all_stop_after_the_same_step_which_none_has_done_yet(data):
  """Processes are some steps apart, since devices lag behind; each hears the others at moments of its own."""
  count, start = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 100))
  processes = begun(count, start)
  done = [start + data.draw(st.integers(0, 5)) for _ in processes]
  for process, last in zip(processes, done, strict=True):
    assert not any(process.preemption.due() for _ in range(last - start))
  for told in data.draw(st.sets(st.integers(0, count - 1), min_size=1)):
    processes[told].preemption._tell("SIGTERM")
  order = data.draw(st.lists(st.sampled_from(processes), max_size=6)) + processes * 2
  for process in order:
    share(processes, [process])
  for process, last in zip(processes, done, strict=True):
    stops = [step for step in range(last + 1, start + 10) if process.preemption.due()]
    assert stops == [max(done) + 1]


def test_while_they_agree_none_goes_on():
  """Else one might be beyond the step by then."""
  processes = begun(2, 0)
  processes[0].preemption._tell("SIGTERM")
  share(processes, processes[:1])
  answers = []
  main = threading.Thread(target=lambda: answers.append(processes[0].preemption.due()), daemon=True)
  main.start()
  main.join(0.3)
  assert answers == []
  for process in reversed(processes):
    share(processes, [process])
  main.join(20)
  assert answers == [True]


def test_none_stops_that_was_not_told():
  processes = begun(2, 0)
  share(processes, processes)
  assert not any(process.preemption.due() for process in processes for _ in range(100))


def test_the_cause_names_the_process_that_was_told():
  processes = begun(2, 0)
  processes[1].preemption._tell("SIGTERM")
  share(processes, processes)
  assert [process.preemption.cause for process in processes] == ["SIGTERM to process 1", "SIGTERM"]


@pytest.mark.parametrize("told", [0, 1, 2])
@pytest.mark.parametrize("ahead", [None, 0, 2])
def test_sigterm_to_one_during_its_set_up_ends_all_and_process_0_last(told, ahead, monkeypatch, capsys):
  """Whether or not another has begun: without that one it cannot have done a step."""
  ends, waits = [], []
  monkeypatch.setattr(preemption, "os", SimpleNamespace(environ={}, _exit=ends.append))
  monkeypatch.setattr(preemption, "time", SimpleNamespace(sleep=waits.append))
  processes = [Told(process, 3) for process in range(3)]
  for process in processes:
    process.preemption._begun = process.here == ahead != told
  processes[told].preemption._take(signal.SIGTERM)
  others = processes[:told] + processes[told + 1 :]
  share(processes, others)
  assert ends == [STOPPED] * 3
  waited = dict(zip([told, *(process.here for process in others)], waits, strict=True))
  assert waited[0] >= waited[1] + 2 * BEAT == waited[2] + 2 * BEAT
  first, *rest = capsys.readouterr().err.strip().split("\n\n")
  assert first == "stopped by SIGTERM during set-up; the same command starts again"
  assert rest == [f"stopped by SIGTERM to process {told} during set-up; the same command starts again"] * 2


def test_asking_after_every_step_costs_nothing_to_speak_of():
  with Peers() as peers:
    preemption, began = Preemption(peers), time.perf_counter()
    for _ in range(10_000):
      preemption.due()
    assert (time.perf_counter() - began) / 10_000 < 1e-3  # measured: 1e-6


# A run that begins when it is told to by its argument, and whose main thread then is in a call that no handler ends.
RUN = """
import ctypes, sys, time
from switchlora_jax.parallel.heartbeat import Peers
from switchlora_jax.parallel.preemption import Preemption
with Peers() as peers, Preemption(peers) as preemption:
  if sys.argv[1] != "set-up":
    preemption.begin()
  print("ready", flush=True)
  if sys.argv[1] == "blocked":
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)  # for ever
  for step in range(11, 10_000):
    time.sleep(0.2)
    if preemption.due():
      print(f"{preemption.cause}, {step}", flush=True)
      break
print("closed", flush=True)
"""


def started(phase: str, **environment):
  command = [sys.executable, "-c", RUN, phase]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)
  assert process.stdout.readline() == "ready\n"
  return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_after_the_step(number):
  """… also where it is sent twice, at the same time."""
  process = started("steps")
  process.send_signal(number)
  time.sleep(0.05)
  process.send_signal(number)
  said, error = process.communicate(timeout=300)
  cause, step = said.splitlines()[0].split(", ")
  assert cause == number.name and 11 <= int(step) < 30
  assert said.endswith("closed\n") and process.returncode == 0 and error == ""


def test_ctrl_c_once_more_ends_it_at_once_whatever_the_main_thread_does_and_sigterm_does_not():
  process = started("blocked")
  for _ in range(2):
    process.send_signal(signal.SIGTERM)
    time.sleep(ONE + 0.5)
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=120)
  assert process.returncode == 130
  assert error == "\nstopped at once by Ctrl-C; the same command continues from the last save\n"


def test_during_set_up_a_signal_ends_it_at_once_to_be_started_again():
  process = started("set-up")
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=120)
  assert process.returncode == STOPPED
  assert error == "\nstopped by SIGTERM during set-up; the same command starts again\n"


def test_it_stops_when_the_process_that_started_it_is_gone():
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  said, _ = started("steps", **{PARENT: str(gone.pid)}).communicate(timeout=300)
  assert said.startswith("the end of the process that started it, ") and said.endswith("closed\n")


def test_it_does_not_stop_while_that_process_lives():
  process = started("steps", **{PARENT: str(os.getpid())})
  time.sleep(3)
  assert process.poll() is None
  process.kill()
  process.communicate()


def test_no_signal_is_lost_where_handlers_change(monkeypatch):
  """While SIGTERM has a handler that does nothing, each leaves its byte."""
  fd, heard = [-1], []
  install, wake = signal.signal, signal.set_wakeup_fd
  monkeypatch.setattr(signal, "signal", lambda *it: (install(*it), heard.append(fd[0] != -1))[0])
  monkeypatch.setattr(signal, "set_wakeup_fd", lambda new, **how: (wake(new, **how), fd.__setitem__(0, new))[0])
  with Peers() as peers, Preemption(peers) as preemption:
    preemption.begin()
  assert heard and all(heard)


def test_handlers_are_as_they_were_afterwards():
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with Peers() as peers, Preemption(peers) as preemption:
    preemption.begin()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
  assert signal.set_wakeup_fd(-1) == -1
