"""Runs hundreds of commands: JAX is imported once, and each command runs in a fork of that process.

`python tests/faults/forks.py` reads one JSON list per line, [command, argument, …], and answers each with one line,
[exit code, stdout, stderr]. No device is used before the fork.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RUN_TIMEOUT = 180  # seconds that one command may take


class CommandResult(NamedTuple):
  """Exit code and output of a command."""

  code: int
  stdout: str
  stderr: str


@contextlib.contextmanager
def forks(folder: Path) -> Iterator[Callable[..., CommandResult]]:
  """Yields a function (name in experiments/, argument, …) -> result of that command, run in `folder`."""
  shared = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
  pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  with subprocess.Popen([sys.executable, __file__], env=shared, cwd=folder, **pipes) as server:

    def run(*command: str) -> CommandResult:
      print(json.dumps(command), file=server.stdin, flush=True)
      return CommandResult(*json.loads(server.stdout.readline()))

    yield run
    server.stdin.close()


def serve():
  """Imports the modules of all commands, then forks for each line of stdin."""
  for package in ("switchlora_jax", "experiments.common", "experiments.paper"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
      importlib.import_module(module.name)
  for line in sys.stdin:
    print(json.dumps(fork(json.loads(line))), flush=True)


def fork(command: list[str]) -> CommandResult:
  """Runs one command in a child process."""
  kind = dict(mode="w+", errors="backslashreplace")
  with tempfile.TemporaryFile(**kind) as stdout, tempfile.TemporaryFile(**kind) as stderr:
    if not (child := os.fork()):
      run_in_child(command, stdout, stderr)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = [(file.seek(0), file.read())[1] for file in (stdout, stderr)]
  return CommandResult(code, *texts)


def run_in_child(command: list[str], stdout, stderr):
  """Runs the command as `python -m` does, then ends the process. Does not return."""
  for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), stdout.fileno(), stderr.fileno())):
    os.dup2(file, number)
  signal.alarm(RUN_TIMEOUT)
  sys.argv, code = command, 0
  try:
    runpy.run_module(f"experiments.{command[0]}", run_name="__main__", alter_sys=True)
  except SystemExit as end:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
  except BaseException:
    traceback.print_exc()
    code = 1
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


if __name__ == "__main__":
  serve()
