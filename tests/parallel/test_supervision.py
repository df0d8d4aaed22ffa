"""Supervision: exchange of statuses, agreement on the last step, hangs, lost and failed processes, signals.

Most tests replace the store by a dictionary and the clock by a number of seconds. The last ones use real processes.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.errors import JaxRuntimeError
from paths import ROOT

from switchlora_jax.errors import HUNG, STOPPED, RunFailed, Stopped, UserError
from switchlora_jax.parallel import supervision
from switchlora_jax.parallel.supervision import GRACE, PARENT, REPEAT, Supervisor

HANG, LOST = 100, 30


class Store:
  """Stand-in for the key-value store."""

  def __init__(self, process: int, count: int, values: dict | None = None):
    self.process, self.count, self.values, self.broken = process, count, {} if values is None else values, False

  def set(self, key, value, overwrite):
    if self.broken:
      raise JaxRuntimeError("UNAVAILABLE")
    assert overwrite
    self.values[key] = value

  def items(self, folder):
    return {key.rpartition("/")[2]: value for key, value in list(self.values.items()) if key.startswith(f"{folder}/")}


def supervisors(count: int = 1, hang: float = HANG, **options) -> list[Supervisor]:
  """Return the supervisors of `count` processes, which share a store. Their threads do not run."""
  values, made = {}, []
  for process in range(count):
    made.append(Supervisor(hang, LOST, **options))
    made[-1]._store = Store(process, count, values)
  return made


def share(group, readers=None):
  """Let every supervisor post its status. Then `readers` (default: all) read the statuses."""
  before = {one: one._statuses for one in group}
  for one in group:
    one._exchange()
    one._statuses = before[one]
  for one in group if readers is None else readers:
    one._exchange()
    one._status["beat"] -= 1


# --- the exchange of statuses ---------------------------------------------------------------------------------------


def wait_for(happened):
  deadline = time.monotonic() + 120
  while not happened():
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.fixture
def pair(monkeypatch):
  """Two supervisors with running threads."""
  monkeypatch.setattr(supervision, "BEAT", 0.05)
  first, second = supervisors(2)
  with first, second:
    yield first, second


def test_every_process_receives_all_statuses(pair):
  first, second = pair
  first.mark("step 3")
  second.mark("step 3")
  second.mark("step 4")
  for one in pair:
    wait_for(lambda one=one: {p: status["marks"] for p, status in one._statuses.items()} == {0: 1, 1: 2})
  beat = first._statuses[1]["beat"]
  wait_for(lambda: first._statuses[1]["beat"] > beat and first._statuses[1]["doing"] == "step 4")


def test_the_last_status_has_the_error_and_is_marked_as_ended(monkeypatch):
  monkeypatch.setattr(supervision, "BEAT", 0.05)
  first, second = supervisors(2)
  with first:
    with pytest.raises(KeyError), second:
      raise KeyError(5)
    wait_for(lambda: first._statuses.get(1, {}).get("ended") and first._statuses[1]["failed"] == "KeyError: 5")


def test_without_a_reply_of_process_0_the_statuses_do_not_change(pair):
  first, _ = pair
  wait_for(lambda: first._statuses)
  first._store.broken = True
  time.sleep(0.2)
  before = first._statuses
  time.sleep(0.3)
  assert first._statuses is before
  first._store.broken = False
  wait_for(lambda: first._statuses is not before)


# --- the last step --------------------------------------------------------------------------------------------------


def in_training(count: int, start: int = 0):
  group = supervisors(count)
  for one in group:
    one._asked, one._steps_begun = start, True  # `begin_steps` without its handler
  return group


def agree(group, readers=None):
  share(group, readers)
  for one in group if readers is None else readers:
    one._agree_on_last_step()


@given(st.data())
def test_all_stop_after_the_same_step_which_no_process_has_finished(data):
  """Processes may be some steps apart, because steps are dispatched asynchronously, and read statuses at any time."""
  count, start = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 100))
  group = in_training(count, start)
  done = [start + data.draw(st.integers(0, 5)) for _ in group]
  for one, last in zip(group, done, strict=True):
    assert not any(one.should_stop() for _ in range(last - start))
  for process in data.draw(st.sets(st.integers(0, count - 1), min_size=1)):
    group[process]._request_stop("SIGTERM")
  order = data.draw(st.lists(st.sampled_from(group), max_size=6)) + group * 2
  for one in order:
    agree(group, [one])
  for one, last in zip(group, done, strict=True):
    stops = [step for step in range(last + 1, start + 10) if one.should_stop()]
    assert stops == [max(done) + 1]


def test_no_process_continues_during_the_agreement():
  """Otherwise it could continue beyond the agreed last step."""
  group, answers = in_training(2), []
  group[0]._request_stop("SIGTERM")
  agree(group, group[:1])
  main = threading.Thread(target=lambda: answers.append(group[0].should_stop()), daemon=True)
  main.start()
  main.join(0.3)
  assert answers == []
  for one in reversed(group):
    agree(group, [one])
  main.join(20)
  assert answers == [True]


def test_without_a_request_no_process_stops():
  group = in_training(2)
  agree(group)
  assert not any(one.should_stop() for one in group for _ in range(100))


def test_the_cause_names_the_process_that_received_the_signal():
  group = in_training(2)
  group[1]._request_stop("SIGTERM")
  agree(group)
  assert [one.cause for one in group] == ["SIGTERM to process 1", "SIGTERM"]


@pytest.mark.parametrize("receiver", [0, 1, 2])
@pytest.mark.parametrize("ahead", [None, 0, 2])
def test_sigterm_during_the_set_up_of_one_process_ends_all(receiver, ahead):
  """Also if another process has begun training, because no step can finish without all processes."""
  ends, group = {}, supervisors(3)
  for one in group:
    process = one._store.process
    one._on_failure = lambda *end, process=process: ends.update({process: end})
    one._steps_begun = process == ahead != receiver
  group[receiver]._receive(signal.SIGTERM)
  share(group)
  for one in group:
    one._check(1)
  expected = {process: f"stopped by SIGTERM to process {receiver} during set-up" for process in range(3)}
  expected[receiver] = "stopped by SIGTERM during set-up"
  assert ends == {process: (f"{why}; the same command starts again", STOPPED) for process, why in expected.items()}


def test_should_stop_takes_no_time():
  with Supervisor(HANG, LOST) as one:
    began = time.perf_counter()
    for _ in range(10_000):
      one.should_stop()
    assert (time.perf_counter() - began) / 10_000 < 1e-3  # measured: 1e-6


# --- hangs, lost and failed processes -------------------------------------------------------------------------------


def marked(process: int = 0, count: int = 1, hang: float = HANG) -> Supervisor:
  """Return the supervisor of a process, in training, with statuses of all processes."""
  one = supervisors(count, hang)[process]
  one._statuses = {p: {"beat": 0, "marks": 7, "doing": f"step {p}"} for p in range(count)}
  one.mark("restoring the newest checkpoint")
  return one


def update(one: Supervisor, process: int, **facts):
  one._statuses = one._statuses | {process: one._statuses[process] | facts}


def failure_within(one: Supervisor, seconds: int, silent: set[int] = frozenset()) -> str | None:
  """Return the first failure, if there is any, while all processes but the silent ones post statuses."""
  for _ in range(seconds):
    for process in set(one._statuses) - set(silent):
      update(one, process, beat=one._statuses[process]["beat"] + 1)
    if failure := one.find_failure(1):
      message, code = failure
      assert code == HUNG
      return message
  return None


def test_a_run_that_makes_progress_has_no_failure():
  one = marked(count=2)
  for step in range(20):
    one.mark(f"step {step}")
    assert failure_within(one, HANG - 1) is None


def test_a_hang_is_reported_with_the_stacks(capfd):
  one = marked()
  one.mark("step 38, on the devices")
  assert re.fullmatch(
    r"process 0 has hung since \d\d:\d\d:\d\d at: step 38, on the devices; no progress for 100 s "
    r"\(--config.hang_seconds\); the stacks of its threads are above; the same command .*continues from .*",
    failure_within(one, HANG + 3),
  )
  assert "test_a_hang_is_reported_with_the_stacks" in capfd.readouterr().err


@pytest.mark.parametrize("here", [0, 1, 2])
def test_a_hang_of_several_processes_names_the_one_behind(here):
  one = marked(here, 3)
  for process, marks in enumerate((9, 8, 9)):
    update(one, process, marks=marks)
  assert "furthest behind is process 1, at: step 1; the stacks" in failure_within(one, HANG + 3)


def test_zero_disables_the_check_for_hangs():
  assert failure_within(marked(hang=0), 10_000) is None


def test_set_up_is_not_checked_for_hangs():
  (one,) = supervisors()
  one._exchange()
  assert failure_within(one, 10_000) is None


@pytest.mark.parametrize(("here", "silent"), [(0, 1), (1, 2), (2, 1), (1, 0)])
def test_a_silent_process_is_lost(here, silent):
  one = marked(here, 3)
  assert failure_within(one, 50) is None
  silent_processes = {silent} if silent else {0, 1, 2}  # all statuses pass through process 0
  assert failure_within(one, LOST - 2, silent_processes) is None
  assert failure_within(one, 5, silent_processes).startswith(
    f"process {silent} of 3 is lost: no heartbeat for 30 s (--peer_timeout); it was last at: s"
  )


@pytest.mark.parametrize("here", [1, 2])
def test_if_process_0_does_not_reply_no_other_process_is_reported_as_lost(here):
  """Even if the last status of the other process is slightly older."""
  one = marked(here, 3)
  assert failure_within(one, 3, {3 - here}) is None
  assert failure_within(one, LOST + 1, {0, 1, 2}).startswith("process 0 of 3 is lost")


def test_process_0_is_lost_if_it_never_replied():
  (_, one) = supervisors(2)
  assert failure_within(one, LOST - 1) is None
  assert one.find_failure(3)[0].startswith("process 0 of 2 is lost: no heartbeat for 30 s")


def test_a_process_that_has_ended_is_not_lost():
  one = marked(0, 2)
  update(one, 1, ended=True)
  assert failure_within(one, HANG - 5, {1}) is None


def test_a_failed_process_ends_the_processes_that_do_not_end_by_themselves():
  one = marked(0, 2)
  update(one, 1, failed="KeyError: 5", ended=True)
  assert failure_within(one, int(GRACE)) is None
  assert failure_within(one, 2).startswith("process 1 has failed (KeyError: 5), see its output; the same command")


@pytest.mark.parametrize("error", [KeyError(5), KeyboardInterrupt()])  # Ctrl-C during set-up
def test_an_error_is_reported_to_the_others_immediately(error):
  one = marked(1, 2)
  with pytest.raises(type(error)), one.report_errors():
    raise error
  assert one._status["failed"] == f"{type(error).__name__}: {error}"


def test_the_message_has_the_earlier_error_of_the_process():
  """The exception was not reported, because the process was waiting for a save."""
  one, ends = marked(1, 2), []
  one._on_failure = lambda *end: ends.append(end)
  with pytest.raises(KeyError), one.report_errors():
    raise KeyError(5)
  one._fail("process 0 of 2 is lost", HUNG)
  assert ends == [("KeyError: 5; and before this process could end, process 0 of 2 is lost", HUNG)]


GLOO = JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")


def caused_by(cause: Exception, error: Exception) -> Exception:
  error.__cause__ = cause
  return error


@pytest.mark.parametrize("error", [GLOO, caused_by(GLOO, UserError("step 5 could not be saved"))])
def test_an_error_that_another_process_may_have_caused_waits_for_its_status(error, monkeypatch, capsys):
  one, slept = marked(1, 2), []
  monkeypatch.setattr(supervision, "time", SimpleNamespace(sleep=slept.append))
  with pytest.raises(type(error)), one.report_errors(), one.report_errors():
    raise error
  assert slept == [LOST + 3 * GRACE] and "waiting for its status" in capsys.readouterr().err


@pytest.mark.parametrize(
  "error",
  [
    OSError(107, "Transport endpoint is not connected", "/mnt/socket"),
    UserError("reading failed with ConnectionResetError: Connection reset by peer"),
    JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
  ],
)
def test_an_error_that_only_this_process_can_cause_is_reported_immediately(error, monkeypatch):
  monkeypatch.setattr(supervision, "time", None)
  one = marked(1, 2)
  with pytest.raises(type(error)), one.report_errors():
    raise error
  assert one._status["failed"].startswith(type(error).__name__)


def test_a_single_process_does_not_wait_for_a_status(monkeypatch):
  monkeypatch.setattr(supervision, "time", None)
  with pytest.raises(JaxRuntimeError), marked().report_errors():
    raise GLOO


def test_a_stopped_run_has_not_failed():
  one = marked(0, 2)
  with pytest.raises(Stopped), one.report_errors():
    raise Stopped
  assert "failed" not in one._status


# --- exceptions in the main thread ----------------------------------------------------------------------------------


def test_a_hang_raises_in_the_main_thread(capfd):
  """For example in a notebook, whose process must not end."""
  with (
    pytest.raises(RunFailed, match=r"has hung since .* at: step 1; no progress for 0.1 s"),
    Supervisor(0.1, LOST) as one,
  ):
    one.mark("step 1")
    time.sleep(60)
  assert "has hung since" in capfd.readouterr().err


@pytest.mark.parametrize("continues", [lambda one: one.mark("step 2"), Supervisor.should_stop])
def test_a_failure_that_code_catches_is_raised_again(continues):
  """A notebook prompt, for example at a breakpoint, catches every Exception while it waits."""
  events = []
  with pytest.raises(RunFailed, match=r"has hung since .* at: step 1"), Supervisor(0.1, LOST) as one:
    one.mark("step 1")
    one.begin_steps()
    try:
      time.sleep(60)
    except Exception as error:
      events.append(error)
    time.sleep(1)  # two checks, which do not report the failure again
    continues(one)
    events.append("continued")
  assert [type(event) for event in events] == [RunFailed]


def test_ctrl_c_ends_a_prompt_that_caught_a_failure():
  caught = []
  with pytest.raises(KeyboardInterrupt), Supervisor(0.1, LOST) as one:
    one.mark("step 1")
    one.begin_steps()
    for _ in range(2):
      try:
        time.sleep(60 if not caught else REPEAT + 1)
      except Exception as error:
        caught.append(error)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
  assert [type(error) for error in caught] == [RunFailed]


def test_sigterm_during_set_up_raises_in_the_main_thread():
  with pytest.raises(Stopped, match="stopped by SIGTERM during set-up"), Supervisor(HANG, LOST):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_an_exception_is_raised_even_if_its_first_signal_interrupts_nothing(monkeypatch):
  """This happens if the signal arrives just before the main thread blocks."""
  kill, sent = signal.pthread_kill, []
  monkeypatch.setattr(signal, "pthread_kill", lambda *args: sent.append(args) or (len(sent) > 1 and kill(*args)))
  began = time.monotonic()
  with pytest.raises(Stopped), Supervisor(HANG, LOST):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
  assert len(sent) >= 2 and time.monotonic() - began < 10  # more, if the main thread is slow to run the handler


def test_a_second_ctrl_c_raises_in_the_main_thread(monkeypatch):
  """Also if the first signal to the main thread arrives just before it blocks, and interrupts nothing."""
  sent, send = [], signal.pthread_kill
  monkeypatch.setattr(supervision, "REPEAT", 0.2)
  monkeypatch.setattr(signal, "pthread_kill", lambda *to: send(*to) if sent else sent.append(to))
  began = time.monotonic()
  with pytest.raises(KeyboardInterrupt), Supervisor(HANG, LOST) as one:
    one.begin_steps()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
  assert sent and time.monotonic() - began < 20


def wait_in_exit(one):
  """Raise an error that leaves the supervisor's context. Its exit waits for the cause."""
  raise GLOO


def wait_in_run(one):
  """The same, but the error first leaves the context of `report_errors`."""
  with one.report_errors():
    raise GLOO


def wait_elsewhere(one):
  """The cause is found while this process handles the error in another event."""
  try:
    raise GLOO
  except JaxRuntimeError:
    time.sleep(60)


def wrap(one):
  """The same, and the cause is wrapped in another exception."""
  try:
    wait_elsewhere(one)
  except RunFailed as error:
    raise UserError("wrapped") from error


@pytest.mark.parametrize(("fail", "waits"), [(wait_in_exit, 1), (wait_in_run, 1), (wait_elsewhere, 0), (wrap, 0)])
def test_the_cause_of_a_communication_error_ends_the_wait_and_the_supervision(fail, waits, monkeypatch, capfd):
  monkeypatch.setattr(supervision, "BEAT", 0.05)
  monkeypatch.setattr(supervision, "GRACE", 1)
  before = [signal.getsignal(number) for number in supervision.SIGNALS]
  (_, one), began = supervisors(2), time.monotonic()
  one._store.values["status/0"] = json.dumps({"beat": 0, "marks": 0, "doing": "set-up", "failed": "KeyError: 5"})
  with pytest.raises(UserError if fail is wrap else RunFailed) as raised, one:
    fail(one)
  cause = raised.value.__cause__ or raised.value
  assert str(cause).startswith("process 0 has failed (KeyError: 5)") and cause.__context__ is GLOO
  assert time.monotonic() - began < LOST / 2
  assert capfd.readouterr().err.count("waiting for its status") == waits
  assert [signal.getsignal(number) for number in supervision.SIGNALS] == before and signal.set_wakeup_fd(-1) == -1
  assert not any(thread.is_alive() for thread in one._threads)
  last = json.loads(one._store.values["status/1"])
  assert last["ended"] and last["failed"]


def test_nothing_is_raised_after_the_end(capfd):
  """A failure may be found as the supervisor ends. SIGTERM has its old handler then, which may end the process."""
  with Supervisor(HANG, LOST) as one:
    pass
  one._raise_in_main_thread("too late", HUNG)
  assert one._raising is None and "too late" in capfd.readouterr().err


# --- handlers and real processes ------------------------------------------------------------------------------------


def test_no_signal_is_lost_while_handlers_change(monkeypatch):
  """While SIGTERM has the supervisor's handler, Python writes each signal to the pipe."""
  fd, piped = [-1], []
  install, wake = signal.signal, signal.set_wakeup_fd
  monkeypatch.setattr(signal, "signal", lambda *it: (install(*it), piped.append(fd[0] != -1))[0])
  monkeypatch.setattr(signal, "set_wakeup_fd", lambda new, **how: (wake(new, **how), fd.__setitem__(0, new))[0])
  with Supervisor(HANG, LOST) as one:
    one.begin_steps()
  assert piped and all(piped)


def test_handlers_are_restored():
  before = [signal.getsignal(number) for number in supervision.SIGNALS]
  with Supervisor(HANG, LOST) as one:
    one.begin_steps()
    assert [signal.getsignal(number) for number in supervision.SIGNALS] != before
  assert [signal.getsignal(number) for number in supervision.SIGNALS] == before
  assert signal.set_wakeup_fd(-1) == -1


# A run with the `on_failure` of the commands. In the phase "blocked", its main thread runs no Python handler.
RUN = """
import ctypes, sys, time
from experiments.common.distributed import end_process
from switchlora_jax.parallel.supervision import Supervisor
phase, hang = sys.argv[1], float(sys.argv[2])
with Supervisor(hang, 60, end_process) as supervisor:
  if phase != "set-up":
    supervisor.mark("step 10")
    supervisor.begin_steps()
  print("ready", flush=True)
  if phase == "blocked":
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)  # forever
  for step in range(11, 10_000):
    time.sleep(0.2)
    if supervisor.should_stop():
      print(f"{supervisor.cause}, {step}", flush=True)
      break
print("closed", flush=True)
"""


def start(phase: str, hang: float = 0, **environment):
  command = [sys.executable, "-c", RUN, phase, str(hang)]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)
  assert process.stdout.readline() == "ready\n"
  return process


@pytest.mark.parametrize("number", supervision.SIGNALS)
def test_a_signal_stops_after_a_step(number):
  """Also if it arrives twice within a step."""
  process = start("steps")
  process.send_signal(number)
  time.sleep(0.05)
  process.send_signal(number)
  output, error = process.communicate(timeout=300)
  cause, step = output.splitlines()[0].split(", ")
  assert cause == number.name and 11 <= int(step) < 30
  assert output.endswith("closed\n") and process.returncode == 0 and error == ""


def test_a_second_ctrl_c_ends_a_blocked_process_immediately_but_sigterm_does_not():
  process = start("blocked")
  for _ in range(2):
    process.send_signal(signal.SIGTERM)
    time.sleep(REPEAT + 0.5)
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=120)
  assert process.returncode == 130
  assert error == "\nstopped at once by Ctrl-C; the same command continues from the last save\n"


def test_sigterm_during_set_up_ends_a_process_immediately():
  process = start("set-up")
  process.send_signal(signal.SIGTERM)
  _, error = process.communicate(timeout=120)
  assert process.returncode == STOPPED
  assert error == "\nstopped by SIGTERM during set-up; the same command starts again\n"


def test_a_run_stops_after_the_end_of_its_parent():
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  output, _ = start("steps", **{PARENT: str(gone.pid)}).communicate(timeout=300)
  assert output.startswith("the end of the process that started it, ") and output.endswith("closed\n")


def test_a_run_does_not_stop_while_its_parent_runs():
  process = start("steps", **{PARENT: str(os.getpid())})
  time.sleep(3)
  assert process.poll() is None
  process.kill()
  process.communicate()


def test_a_process_that_hangs_ends_by_itself():
  process = start("blocked", hang=1)
  _, error = process.communicate(timeout=300)
  assert process.returncode == HUNG
  assert "error: process 0 has hung since" in error and 'File "<string>", line 13 in <module>' in error


@pytest.mark.slow
def test_a_process_that_was_suspended_has_not_hung():
  process = start("steps", hang=6)
  time.sleep(1.5)  # one or two checks
  os.kill(process.pid, signal.SIGSTOP)
  time.sleep(7)
  os.kill(process.pid, signal.SIGCONT)
  time.sleep(3)
  assert process.poll() is None
  process.kill()
  process.communicate()
