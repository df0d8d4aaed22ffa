"""Child processes of a command: their shares of the cores, and their end."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments.common import children
from experiments.common.children import Children
from switchlora_jax.parallel.supervision import PARENT


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_processes_share_the_cores():
  cores = sorted(os.sched_getaffinity(0))
  with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
    shares = []
    for number in range(2):
      children.share_cores(process.pid, number, 2)
      shares.append(os.sched_getaffinity(process.pid))
    children.share_cores(process.pid, len(cores), len(cores) + 1)
    assert os.sched_getaffinity(process.pid) == {cores[0]}  # more children than cores
    process.communicate(b"\n")
  assert shares == [set(cores[0::2]), set(cores[1::2] or cores[:1])]


SLEEPER = f"import os, time; print(os.environ['{PARENT}'], flush=True); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_children(tmp_path, number):
  """… which get the PID of their parent."""
  codes, running = [], Children()
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored

  def one():
    codes.append(running.run([sys.executable, "-c", SLEEPER], output, (0, 1)))

  with (tmp_path / "output").open("w") as output:
    thread = threading.Thread(target=one)
    with pytest.raises(KeyboardInterrupt), running:
      thread.start()
      while (tmp_path / "output").read_text() != f"{os.getpid()}\n":
        time.sleep(0.01)
      os.kill(os.getpid(), number)
      time.sleep(60)
    thread.join(20)
    one()  # after the end: it is not started
  signal.signal(signal.SIGINT, handler)
  assert codes == [-signal.SIGTERM] * 2
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_child_that_starts_while_the_others_are_stopped_is_stopped_too(tmp_path, monkeypatch):
  running, popen = Children(), subprocess.Popen

  def slow(*args, **how):
    process = popen(*args, **how)
    with pytest.raises(KeyError), running:
      raise KeyError
    return process

  monkeypatch.setattr(subprocess, "Popen", slow)
  with (tmp_path / "output").open("w") as output:
    assert running.run([sys.executable, "-c", "import time; time.sleep(20)"], output, (0, 1)) == -signal.SIGTERM


def test_run_returns_the_exit_code(tmp_path):
  with (tmp_path / "output").open("w") as output, Children() as running:
    assert [running.run([sys.executable, "-c", f"exit({code})"], output, (0, 1)) for code in (0, 3)] == [0, 3]
