"""The processes that a command starts: each has its share of the cores, and none outlives the command."""

import os
import signal
import subprocess

from experiments.common import cli
from switchlora_jax.parallel.preemption import PARENT


class Children:
  """Runs of `experiments.pretrain`; a context of the main thread.

  Where it is left by an exception they are told to stop, and save, and no other is started. SIGTERM raises
  KeyboardInterrupt inside, as Ctrl-C does. Of a SIGKILL the children learn by themselves.
  """

  def __init__(self):
    self._running, self._ended = [], False

  def __enter__(self):
    self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    return self

  def __exit__(self, kind, *_):
    signal.signal(signal.SIGTERM, self._before)
    if kind is not None:
      self._ended = True
      for process in list(self._running):
        process.terminate()

  def run(self, command: list[str], output, share: tuple[int, int]) -> int:
    """Run a command to its end, in any thread; returns its exit code.

    Args:
      output: the open file that its output goes to.
      share: which of how many shares of the cores it gets.
    """
    if self._ended:
      return -signal.SIGTERM
    variables = environment() | {PARENT: str(os.getpid())}
    process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
    self._running.append(process)
    if self._ended:  # while it was started
      process.terminate()
    try:
      share_cores(process.pid, *share)
      return process.wait()
    finally:
      self._running.remove(process)


def share_cores(pid: int, number: int, processes: int):
  """Give a process its share of the cores, where the system can: XLA starts as many threads as it sees cores."""
  if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(pid, cores[number::processes] or [cores[number % len(cores)]])


def environment() -> dict[str, str]:
  """The environment variables of this process, with `experiments` importable from any directory."""
  path = os.pathsep.join(filter(None, [str(cli.ROOT), os.environ.get("PYTHONPATH")]))
  return os.environ | {"PYTHONPATH": path}
