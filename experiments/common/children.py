"""Child processes of a command: each has its share of the cores, and all end with the command."""

import os
import signal
import subprocess

from experiments.common import cli, compiled_programs
from switchlora_jax.parallel.supervision import PARENT


class Children:
  """Runs of `experiments.pretrain`; a context of the main thread.

  An exception that leaves the context sends SIGTERM to the children, which then save, and prevents further ones.
  SIGTERM raises KeyboardInterrupt inside the context, as Ctrl-C does. If this process is killed, the children notice
  it and stop: see `PARENT`.
  """

  def __init__(self):
    self._running, self._ended = [], False

  def __enter__(self):
    self._previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    return self

  def __exit__(self, kind, *_):
    signal.signal(signal.SIGTERM, self._previous_handler)
    if kind is not None:
      self._ended = True
      for process in list(self._running):
        process.terminate()

  def run(self, command: list[str], output, share: tuple[int, int]) -> int:
    """Run a command to its end, from any thread, and return its exit code.

    Args:
      output: open file for stdout and stderr.
      share: (number, total) of this child's share of the cores.
    """
    if self._ended:
      return -signal.SIGTERM
    variables = environment() | {PARENT: str(os.getpid())}
    process = subprocess.Popen(command, stdout=output, stderr=output, env=variables)
    self._running.append(process)
    if self._ended:  # since it was checked above
      process.terminate()
    try:
      share_cores(process.pid, *share)
      return process.wait()
    finally:
      self._running.remove(process)


def share_cores(pid: int, number: int, total: int):
  """Bind a process to its share of the cores, if the system supports it: XLA starts one thread per visible core."""
  if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(pid, cores[number::total] or [cores[number % len(cores)]])


def environment() -> dict[str, str]:
  """The environment variables for a child, in which `experiments` is importable from any directory."""
  path = os.pathsep.join(filter(None, [str(cli.ROOT), os.environ.get("PYTHONPATH")]))
  return os.environ | {"PYTHONPATH": path} | compiled_programs.variables()
