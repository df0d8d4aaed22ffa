"""Told to stop: SIGTERM, SIGINT, or the end of the process that started this one.

The run finishes its step, on several processes all finish the same one, and saves. Ctrl-C once more ends it at once;
SIGTERM does not, which SLURM sends again while the run saves: it has SIGKILL for what takes too long.
Signals are heard by a thread of their own, since Python's handlers wait for the main thread, which may be compiling
or waiting for another process. During set-up there is no step to finish: SIGTERM to any process ends all at once.
(JAX's own service for this knows SIGTERM alone and takes every one of them, a second one and those during set-up too.)
"""

import os
import select
import signal
import threading
import time

from switchlora_jax.errors import STOPPED, to_stderr
from switchlora_jax.parallel.heartbeat import BEAT, Peers

PARENT = "SWITCHLORA_JAX_PARENT"  # in the environment: the process without which this one is to stop
HEARD = (signal.SIGTERM, signal.SIGINT)
POLL = 1.0  # seconds between two looks at the parent
ONE = 2.0  # seconds within which signals are one: SLURM may send its own, and srun hand on another


class Preemption:
  """Whether the run is to stop; a context of the main thread, from the set-up of a run to its end.

  Until `begin` SIGTERM ends all processes at once, and SIGINT raises KeyboardInterrupt as ever.

  Attributes:
    cause: what it was told by, "SIGTERM"; None before. On another process: "SIGTERM to process 1".
  """

  def __init__(self, peers: Peers):
    self._peers, self.cause, self._told, self._begun = peers, None, None, False
    self._asked, self._proposed, self._stop_at, self._changed = 0, None, None, threading.Condition()
    self._leaving = threading.Lock()
    parent = os.environ.get(PARENT)
    self._parent = int(parent) if parent else None
    peers.listen(self._hear)

  def __enter__(self):
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._handlers = {number: signal.getsignal(number) for number in HEARD}
    self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _leave_to_thread)  # now that each leaves its byte
    threading.Thread(target=self._listen, name="signals", daemon=True).start()
    return self

  def __exit__(self, *_):
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._before)
    os.close(self._write)

  def begin(self):
    """The first step follows: from now on signals wait for the end of a step."""
    with self._changed:
      self._begun = True
    signal.signal(signal.SIGINT, _leave_to_thread)

  def due(self) -> bool:
    """Whether the run stops now, as all its processes do; they ask equally often, after every step.

    While they agree on the step it waits, for a second or two, once. The steps are not known by their numbers, which
    come again where a run goes back.
    """
    with self._changed:
      self._changed.wait_for(lambda: self._proposed is None or self._stop_at is not None)
      self._asked += 1
      return self._asked == self._stop_at

  def _hear(self, said: dict[int, dict]):
    """Agree: once one is told, each says how often it has asked; the stop is the next time that none has asked yet."""
    for process, facts in sorted(said.items()):
      if "left" in facts and process != self._peers.here:
        self._leave(f"{facts['left']} to process {process}")
    told = [process for process, facts in sorted(said.items()) if facts.get("told")]
    with self._changed:
      if not (told and self._begun):
        return
      if self._proposed is None:
        self.cause = said[told[0]]["told"] + ("" if told[0] == self._peers.here else f" to process {told[0]}")
        self._proposed = self._asked
        self._peers.say_now(asked=self._proposed)
      proposals = [facts["asked"] for facts in said.values() if "asked" in facts]
      if len(proposals) == self._peers.count:
        self._stop_at = max(proposals) + 1
        self._changed.notify_all()

  def _listen(self):
    """The thread; a byte in the pipe is the number of a signal, and its end is that of the context."""
    while True:
      readable, _, _ = select.select([self._read], [], [], POLL)
      byte = os.read(self._read, 1) if readable else None
      if byte == b"":
        os.close(self._read)
        return
      if byte and byte[0] in HEARD:
        self._take(signal.Signals(byte[0]))
      elif self._parent and os.getppid() != self._parent and self._begun and self._told is None:
        self._tell("the end of the process that started it")

  def _take(self, number: signal.Signals):
    if not self._begun:
      if number == signal.SIGTERM:
        self._peers.say_now(left=number.name)
        self._leave(number.name)
    elif self._told is None:
      self._tell(number.name)
    elif number == signal.SIGINT and time.monotonic() - self._told > ONE:
      to_stderr("stopped at once by Ctrl-C; the same command continues from the last save")
      os._exit(128 + number)

  def _leave(self, cause: str):
    """End at once: not all have begun, so none has finished a step. Process 0 is last, since all hear through it."""
    self._leaving.acquire()  # once
    if self._peers.count > 1:
      time.sleep(3 * BEAT if self._peers.here == 0 else BEAT)
    to_stderr(f"stopped by {cause} during set-up; the same command starts again")
    os._exit(STOPPED)

  def _tell(self, cause: str):
    self._told = time.monotonic()
    self._peers.say_now(told=cause)


def _leave_to_thread(*_):
  """A handler in Python, without which there would be no byte in the pipe."""
