"""One process at a time in a directory, also when the other is killed."""

import os
import resource
import signal
import subprocess
import sys

import pytest
from paths import ROOT

from switchlora_jax.runs.lock import Taken, alone

HOLDER = """
import sys
from pathlib import Path
from switchlora_jax.runs.lock import alone
with alone(Path(sys.argv[1]), wait=False):
  print("held", flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds the lock of `tmp_path`."""
  pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, **pipes) as process:
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def take(folder):
  with alone(folder, wait=False):
    return (folder / ".lock").read_text()


def test_another_process_is_refused_and_told_who_has_it(tmp_path, holder):
  for _ in range(2):  # the first attempt leaves the text alone
    with pytest.raises(Taken, match=rf"^process {holder.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d$"):
      take(tmp_path)


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert take(tmp_path).startswith(f"process {os.getpid()} on ")


def test_it_may_be_taken_again_and_again_but_not_twice(tmp_path):
  take(tmp_path)
  with alone(tmp_path, wait=False), pytest.raises(Taken):
    take(tmp_path)
  assert take(tmp_path).count("\n") == 1 and (tmp_path / ".lock").read_bytes() == b""


def test_on_a_full_disk_a_lock_holds_and_has_no_name(tmp_path):
  room = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, room[1]))  # a write fails as it does where there is no room
  try:
    with alone(tmp_path, wait=False), pytest.raises(Taken, match=r"^a process that has not said which it is$"):
      take(tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, room)


def test_one_may_wait_for_it(tmp_path, holder):
  holder.stdin.close()
  with alone(tmp_path, wait=True):
    assert holder.wait() == 0


def test_a_directory_that_cannot_be_written_is_no_other_process(tmp_path):
  with pytest.raises(FileNotFoundError):
    take(tmp_path / "none")
