"""Supervision of a run: signals, hangs, and processes that fail or are lost.

Two threads run beside training. One exchanges a small status between the processes every second, through the key-value
store; it blocks while process 0, which hosts the store, does not answer. The other one receives signals and evaluates
the statuses. Neither ends the process; `on_failure` may.

JAX's own services do not suffice. Its preemption service consumes every SIGTERM, also a second one and one during
set-up, and ignores SIGINT. Its heartbeat aborts a process (SIGABRT) without naming the lost one.
"""

import contextlib
import faulthandler
import json
import os
import re
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable

import jax

from switchlora_jax.errors import HUNG, STOPPED, RunFailed, Stopped, UserError, to_stderr
from switchlora_jax.parallel.processes import Store

BEAT = 1.0  # seconds between two exchanges of statuses
TICK = 0.5  # seconds between two checks
GRACE = 5.0  # seconds in which every process reads a new status, or fails with the same error
REPEAT = 2.0  # seconds within which signals count as one: SLURM and srun may each send theirs
PARENT = "SWITCHLORA_JAX_PARENT"  # environment variable with the PID of a parent process whose end stops the run
SIGNALS = (signal.SIGTERM, signal.SIGINT)
REMEDY = "the same command on all processes continues from the last checkpoint"
COMMUNICATION = re.compile("gloo|nccl|connection|socket|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", re.IGNORECASE)


class Supervisor:
  """A context around a run, entered by the main thread.

  A SIGTERM to any process before `begin_steps` ends the run on all processes. Afterwards SIGTERM and SIGINT stop all
  processes after the same step. SIGINT once more ends this process at once; SIGTERM does not, since SLURM repeats it
  while the run saves, and sends SIGKILL if the save takes too long.

  Args:
    hang_seconds: time without a `mark` after which the run counts as hung; 0 disables the check. Set-up before the
      first mark is not checked, since tokenizing a corpus takes hours. Time in which the process was suspended does
      not count.
    peer_seconds: time without a new status of another process after which that process counts as lost.
    on_failure: `on_failure(message, exit_code)` is called in a thread if the run cannot continue. By default the
      message is printed, and raised in the main thread as soon as that thread executes Python code: as `RunFailed`
      (code HUNG), `Stopped` (STOPPED) or KeyboardInterrupt (130). Code that catches this exception, such as a prompt
      of a notebook, does not end the run: `mark` and `should_stop` raise it again.

  Attributes:
    cause: why the run stops, such as "SIGTERM", or "SIGTERM to process 1" on another process; None while it does not.
  """

  def __init__(self, hang_seconds: float, peer_seconds: float, on_failure: Callable[[str, int], None] | None = None):
    self._hang_seconds, self._peer_seconds = hang_seconds, peer_seconds
    self._on_failure = on_failure or self._raise_in_main_thread
    self._store, self._lock, self.cause = Store(), threading.Condition(), None
    self._status, self._statuses = {"beat": 0, "marks": 0, "doing": "set-up"}, {}  # own; of all processes by number
    self._unchanged = {}  # {what: (value, seconds for which it has not changed)}
    self._asked, self._proposed, self._last = 0, None, None  # counts of `should_stop`: now, proposed, agreed
    self._steps_begun, self._ending_since, self._failed, self._exiting = False, None, False, False
    self._error, self._raising = None, None  # raised in the main thread by `mark` and `should_stop`; by the handler
    self._parent = int(os.environ.get(PARENT, 0))
    self._ended = threading.Event()
    self._threads = [threading.Thread(target=main, daemon=True) for main in (self._supervise, self._communicate)]

  def __enter__(self):
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
    self._wakeup_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, self._handle)
    for thread in self._threads[: self._store.count]:  # a single process exchanges nothing
      thread.start()
    return self

  def __exit__(self, kind, error, trace):
    try:
      self._report(error)
    finally:  # also if supervision raises an exception in this thread while `_report` waits
      self._exiting = True  # from now on, nothing is raised in this thread
      with self._lock:
        self._status["ended"] = True
        self._ended.set()
      for number, handler in self._handlers.items():
        signal.signal(number, handler)
      signal.set_wakeup_fd(self._wakeup_fd)
      os.close(self._write)
      for thread in self._threads[: self._store.count]:
        thread.join(2 * BEAT)  # no longer, since process 0 may not answer

  def mark(self, doing: str):
    """Record progress. All processes make the same marks in the same order; the first one follows set-up.

    Raises:
      RunFailed, Stopped, KeyboardInterrupt: the run cannot continue, and the first such exception was caught.
    """
    self._raise_again()
    self._send(marks=self._status["marks"] + 1, doing=doing)

  def begin_steps(self):
    """Make signals wait for the end of a step from now on."""
    with self._lock:
      self._steps_begun = True
    signal.signal(signal.SIGINT, self._handle)

  def should_stop(self) -> bool:
    """Return whether the run stops after this step, which is the same one on all processes.

    All processes call this once per step. After a stop is requested, one call waits a second or two until they agree.
    Calls are counted rather than steps, since a rollback repeats step numbers. Raises as `mark` does.
    """
    self._raise_again()
    with self._lock:
      self._lock.wait_for(lambda: self._proposed is None or self._last is not None)
      self._asked += 1
      return self._asked == self._last

  @contextlib.contextmanager
  def report_errors(self):
    """Report an exception to the other processes when it leaves this context, as the exit of the outer context does."""
    try:
      yield
    except BaseException as error:
      self._report(error)
      raise

  def find_failure(self, seconds: float) -> tuple[str, int] | None:
    """Return (message, exit code) if the run cannot continue, given that `seconds` have passed since the last call."""
    here = self._store.process
    statuses = dict(self._statuses) or {here: self._status}
    for process, status in sorted(statuses.items()):
      if "left" in status:
        return f"stopped by {self._by(process, status['left'])} during set-up; the same command starts again", STOPPED
    silent = {
      process: self._seconds_unchanged(process, status["beat"], seconds)
      for process, status in statuses.items()
      if process == here or not status.get("ended")
    }
    failed = min((p for p, status in statuses.items() if "failed" in status and p != here), default=None)
    if self._seconds_unchanged("failed", failed, seconds) > GRACE and failed is not None:
      return f"process {failed} has failed ({statuses[failed]['failed']}), see its output; {REMEDY}", HUNG
    if (lost := self._find_lost(silent)) is not None:
      doing = statuses.get(lost, {}).get("doing", "set-up")
      return (
        f"process {lost} of {self._store.count} is lost: no heartbeat for {self._peer_seconds:g} s "
        f"(--peer_timeout); it was last at: {doing}; see its output, end it if it still exists, and {REMEDY}"
      ), HUNG
    still = self._seconds_unchanged("marks", self._status["marks"], seconds)
    if self._status["marks"] and 0 < self._hang_seconds < still:
      return self._describe_hang(statuses, still), HUNG
    return None

  def _seconds_unchanged(self, what, value, seconds: float) -> float:
    last, unchanged = self._unchanged.get(what, (None, 0.0))
    self._unchanged[what] = value, unchanged + seconds if value == last else 0.0
    return self._unchanged[what][1]

  def _find_lost(self, silent: dict[int, float]) -> int | None:
    """Return the process that is lost. If this process's own status does not come back either, it is process 0."""
    if (own := silent.get(self._store.process, 0.0)) > GRACE:
      return 0 if own > self._peer_seconds else None
    return min((process for process, seconds in silent.items() if seconds > self._peer_seconds), default=None)

  def _describe_hang(self, statuses: dict[int, dict], still: float) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - still))
    behind = min(sorted(statuses), key=lambda process: statuses[process]["marks"])
    others = f"; furthest behind is process {behind}, at: {statuses[behind]['doing']}" if self._store.count > 1 else ""
    with contextlib.suppress(OSError, ValueError):  # the stderr of a notebook may not be a file
      faulthandler.dump_traceback(all_threads=True)
    return (
      f"process {self._store.process} has hung since {since} at: {self._status['doing']}; no progress for "
      f"{self._hang_seconds:g} s (--config.hang_seconds){others}; the stacks of its threads are above; {REMEDY}"
    )

  def _by(self, process: int, cause: str) -> str:
    return cause if process == self._store.process else f"{cause} to process {process}"

  # --- the thread that exchanges statuses ---

  def _send(self, **facts):
    """Add facts, which are plain values, to the status of this process."""
    with self._lock:
      self._status |= facts

  def _communicate(self):
    while True:
      ended = self._ended.is_set()
      self._exchange()
      if ended:
        return
      self._ended.wait(BEAT)

  def _exchange(self):
    with self._lock:
      self._status["beat"] += 1
      status = dict(self._status)
    if self._store.count == 1:
      self._statuses = {0: status}
      return
    try:
      self._store.set(f"status/{self._store.process}", json.dumps(status), overwrite=True)
      found = self._store.items("status")
    except jax.errors.JaxRuntimeError:  # process 0 does not answer: `find_failure` sees statuses that stay the same
      return
    self._statuses = {int(process): json.loads(text) for process, text in found.items()}

  # --- the thread that receives signals and evaluates statuses ---

  def _supervise(self):
    """Read the numbers of signals from the pipe until it is closed, and check the statuses at every tick."""
    last = time.monotonic()
    while True:
      readable, _, _ = select.select([self._read], [], [], TICK)
      byte = os.read(self._read, 1) if readable else None
      if byte == b"":
        os.close(self._read)
        return
      if byte and byte[0] in SIGNALS:
        self._receive(signal.Signals(byte[0]))
      now = time.monotonic()
      self._check(min(now - last, 2 * TICK))  # more has passed only if the process was suspended
      last = now

  def _receive(self, number: signal.Signals):
    if not self._steps_begun:
      if number == signal.SIGTERM and not self._failed:
        self._send(left=number.name)
    elif self._ending_since is None:
      self._request_stop(number.name)
    elif number == signal.SIGINT and time.monotonic() - self._ending_since > REPEAT:
      self._fail("stopped at once by Ctrl-C; the same command continues from the last save", 128 + number)

  def _request_stop(self, cause: str):
    self._ending_since = time.monotonic()
    self._send(stop=cause)

  def _check(self, seconds: float):
    if self._failed:
      self._interrupt()  # again: a signal right before a blocking call does not interrupt that call
      return
    if self._store.count == 1:
      self._exchange()
    if self._parent and os.getppid() != self._parent and self._steps_begun and self._ending_since is None:
      self._request_stop("the end of the process that started it")
    self._agree_on_last_step()
    if failure := self.find_failure(seconds):
      self._fail(*failure)

  def _agree_on_last_step(self):
    """Propose the current step when a stop is requested; all stop one step after the latest proposal."""
    requests = {process: status["stop"] for process, status in self._statuses.items() if "stop" in status}
    with self._lock:
      if not (requests and self._steps_begun):
        return
      if self._proposed is None:
        process = min(requests)
        self.cause, self._proposed = self._by(process, requests[process]), self._asked
        self._send(asked=self._proposed)
      proposals = [status["asked"] for status in self._statuses.values() if "asked" in status]
      if len(proposals) == self._store.count:
        self._last = max(proposals) + 1
        self._lock.notify_all()

  def _fail(self, message: str, code: int):
    self._failed, self._ending_since = True, time.monotonic()
    if "failed" in self._status:  # the error of this process, which waited for a save
      message = f"{self._status['failed']}; and before this process could end, {message}"
    self._on_failure(message, code)

  def _report(self, error: BaseException | None):
    """Report an exception, so that the others end; if another process may be the cause, first wait for its status."""
    if error is None or self._error or isinstance(error, Stopped) or "failed" in self._status:
      return
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if self._store.count > 1 and _is_communication_error(error):
      to_stderr(f"{reason}\nanother process may have caused this error; waiting for its status")
      time.sleep(self._peer_seconds + 3 * GRACE)  # until supervision has found the cause, and `on_failure` has returned
    elif self._store.count > 1 and self._status["marks"]:  # printed now, because this process still waits for its save
      readable = isinstance(error, UserError | OSError | KeyboardInterrupt)
      described = reason if readable else "".join(traceback.format_exception(error))
      to_stderr(f"{described}\nthis process ends after a save in progress, the others in {GRACE:g} s")
    self._send(failed=reason)

  def _raise_in_main_thread(self, message: str, code: int):
    to_stderr(message)
    with self._lock:
      if not self._exiting:
        self._error = self._raising = {HUNG: RunFailed, STOPPED: Stopped}.get(code, KeyboardInterrupt)(message)
        if code != STOPPED:  # then the others end as well
          self._status.setdefault("failed", message)
    self._interrupt()

  def _interrupt(self):
    """Have the main thread run `_handle`, if it has an exception to raise."""
    with self._lock:
      if self._raising and not self._exiting:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

  def _handle(self, *_):
    """Handler of both signals in the main thread. Python has already written the number of the signal to the pipe."""
    error, self._raising = self._raising, None
    if error and not self._exiting:
      raise error

  def _raise_again(self):
    if self._error:
      raise self._error


def _is_communication_error(error: BaseException | None) -> bool:
  """Return whether the error, or its cause, is one that JAX raises when another process ends."""
  while error:
    if isinstance(error, jax.errors.JaxRuntimeError) and COMMUNICATION.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False
