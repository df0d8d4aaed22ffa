"""Ends a run that hangs, or whose other processes are lost, within a bounded time and with a sentence.

A thread looks once a second at what the main thread has done, and at what the other processes say of themselves. It
counts the time in which it was awake: a process that was stopped and goes on has not hung.
"""

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import socket
import threading
import time
import traceback

import jax
from jax._src import distributed  # as in hosts.py

from switchlora_jax.errors import HUNG, Stopped, UserError, to_stderr
from switchlora_jax.parallel.heartbeat import Peers

TICK = 0.5  # seconds
GRACE = 5.0  # seconds in which every process can hear, say or do the same by itself
REMEDY = "the same command on all processes continues from the last checkpoint"
HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)  # of a signal, in C
_handlers = []  # which must live as long as the process
ELSEWHERE = re.compile("gloo|nccl|connection|socket|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", re.IGNORECASE)


class Watchdog:
  """A context around a run.

  Args:
    hang_seconds: without a mark after which the run has hung; 0: never.
    peer_seconds: without a sign of life of another process after which it is lost.
  """

  def __init__(self, peers: Peers, hang_seconds: float, peer_seconds: float):
    self._peers, self._hang_seconds, self._peer_seconds = peers, hang_seconds, peer_seconds
    self._marks, self._doing, self._begun = 0, "set-up", False
    self._failure = None  # of this process, which it has told the others
    self._quiet, self._silent, self._failing = _Still(), {}, 0.0
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self):
    if self._peers.count > 1:
      self._speak_when_aborted()
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    self._thread.join()

  def begin(self):
    """Set-up, which may take as long as it takes to tokenise a corpus, is over: a hang is counted from now on."""
    self._begun = True
    self.mark("restoring the newest checkpoint")

  def mark(self, doing: str):
    """The main thread has come to what it is `doing` now; every process makes the same marks in the same order."""
    self._marks += 1
    self._doing = doing
    self._peers.say(marks=self._marks, doing=doing)

  @contextlib.contextmanager
  def telling(self):
    """What is raised inside ends the other processes as well; where one of them was the cause, waits to hear which."""
    try:
      yield
    except Stopped:
      raise
    except BaseException as error:  # Ctrl-C during set-up, too
      reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
      if self._peers.count > 1 and not self._failure:
        if _comes_from_elsewhere(error):
          to_stderr(f"{reason}\nso it looks when another process ends; waiting to hear which")
          time.sleep(self._peer_seconds + GRACE)
        elif self._begun:  # now, since it first waits for a save in flight, and the others do not wait for it
          to_stderr(f"{_in_full(error)}\nthis process ends when a save in flight is done, the others in {GRACE:g} s")
      self._failure = self._failure or reason
      self._peers.say_now(failed=reason)
      raise

  def _watch(self):
    last = time.monotonic()
    while not self._ended.wait(TICK):
      now = time.monotonic()
      sentence = self.look(min(now - last, 2 * TICK))
      last = now
      if sentence:
        self._end(sentence)

  def look(self, seconds: float) -> str | None:
    """What ends the run, now that so many more seconds have passed; None where all is well."""
    said, here = dict(self._peers.said), self._peers.here
    failed = {process: facts["failed"] for process, facts in said.items() if "failed" in facts and process != here}
    self._failing += seconds if failed else 0
    for process, facts in said.items():
      if not (facts.get("ended") and process != here):
        self._silent.setdefault(process, _Still()).look(facts["beat"], seconds)
    if self._failing > GRACE:  # else it ends by itself, with the same sentence
      process, reason = min(failed.items())
      return f"process {process} has failed ({reason}), see what it says; {REMEDY}"
    if (lost := self._lost()) is not None:
      return self._lament(lost, said)
    self._quiet.look(self._marks, seconds)
    if self._begun and 0 < self._hang_seconds < self._quiet.seconds:
      return self._hung(said)
    return None

  def _lost(self) -> int | None:
    """A process that has said nothing for too long. Where not even this one is heard, it is process 0 that is."""
    lost = [process for process, still in self._silent.items() if still.seconds > self._peer_seconds]
    if self._peers.here in lost:
      return 0
    heard = self._peers.here in self._silent and self._silent[self._peers.here].seconds <= GRACE
    return min(lost) if lost and heard else None

  def _lament(self, process: int, said: dict[int, dict]) -> str:
    doing = said.get(process, {}).get("doing", "set-up")
    return (
      f"process {process} of {self._peers.count} is lost: no sign of life for {self._peer_seconds:g} s "
      f"(--peer_timeout); it was last at: {doing}; see what it says, end it if it is still there, "
      f"and {REMEDY}"
    )

  def _hung(self, said: dict[int, dict]) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - self._quiet.seconds))
    others = ""
    if self._peers.count > 1:
      behind = min(sorted(said), key=lambda process: said[process].get("marks", 0))
      others = f"; furthest behind is process {behind}, at: {said[behind].get('doing', 'set-up')}"
    with contextlib.suppress(OSError, ValueError):  # a notebook's stderr may be no file
      faulthandler.dump_traceback(all_threads=True)
    return (
      f"process {self._peers.here} hangs since {since} at: {self._doing}; nothing went on for {self._hang_seconds:g} s "
      f"(--config.hang_seconds){others}; above is what each thread was doing; {REMEDY}"
    )

  def _last_words(self, sentence: str):
    failed = f"{self._failure}; and before it could end, " if self._failure else ""  # while it waited for a save
    to_stderr(f"error: {failed}{sentence}")

  def _end(self, sentence: str):
    self._last_words(sentence)
    if self._peers.here == 0 and self._peers.count > 1:  # the others hear through this process
      time.sleep(GRACE)
    os._exit(HUNG)

  def _speak_when_aborted(self):
    """JAX aborts without any handler of Python's; one of C's that is written in Python can still say why."""
    if self._peers.here != 0:
      _handlers.append(HANDLER(self._aborted))
      ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])

  def _aborted(self, _):
    """In place of the end by SIGABRT that JAX has for a process whose connection to process 0 breaks."""
    address = distributed.global_state.coordinator_address
    host, _, port = address.rpartition(":")
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=GRACE).close()
    except OSError:
      self._last_words(f"process 0 is lost: nothing answers at {address}; see what it says, and {REMEDY}")
      os._exit(HUNG)


def _in_full(error: BaseException) -> str:
  """Its sentence, or the traceback where it is none of those that have one."""
  is_sentence = isinstance(error, UserError | OSError | KeyboardInterrupt)
  return f"{type(error).__name__}: {error}" if is_sentence else "".join(traceback.format_exception(error))


def _comes_from_elsewhere(error: BaseException | None) -> bool:
  """Whether it, or what led to it, is what JAX raises where another process ends; files and users have other types."""
  while error:
    if isinstance(error, jax.errors.JaxRuntimeError) and ELSEWHERE.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


class _Still:
  """For how many seconds a value has been the same."""

  def __init__(self):
    self._value, self.seconds = None, 0.0

  def look(self, value, seconds: float):
    """So many seconds later, the value is this."""
    self.seconds = self.seconds + seconds if value == self._value else 0.0
    self._value = value
