"""Atomic writes, and the lock of a directory, which a killed process releases."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from paths import ROOT

from switchlora_jax.runs.files import LockTaken, atomic_writer, exclusive_lock, replace_text, sync_directory

HOLDER = """
import sys
from pathlib import Path
from switchlora_jax.runs.files import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), wait=False):
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
  with exclusive_lock(folder, wait=False):
    return (folder / ".lock").read_text()


def test_the_error_of_a_taken_lock_names_its_holder(tmp_path, holder):
  for _ in range(2):  # an attempt must not erase the description of the holder
    with pytest.raises(LockTaken, match=rf"^process {holder.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d$"):
      take(tmp_path)


def test_a_killed_process_releases_its_lock(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert take(tmp_path).startswith(f"process {os.getpid()} on ")


def test_a_lock_can_be_taken_repeatedly_but_not_twice_at_once(tmp_path):
  take(tmp_path)
  with exclusive_lock(tmp_path, wait=False), pytest.raises(LockTaken):
    take(tmp_path)
  assert take(tmp_path).count("\n") == 1 and (tmp_path / ".lock").read_bytes() == b""


def test_on_a_full_disk_a_lock_works_without_the_description_of_its_holder(tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # writes fail as on a full disk
  try:
    with exclusive_lock(tmp_path, wait=False), pytest.raises(LockTaken, match=r"^an unknown process$"):
      take(tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_lock_is_taken_after_waiting_for_its_holder(tmp_path, holder):
  holder.stdin.close()
  with exclusive_lock(tmp_path, wait=True):
    assert holder.wait() == 0


def test_a_missing_directory_is_not_reported_as_a_taken_lock(tmp_path):
  with pytest.raises(FileNotFoundError):
    take(tmp_path / "none")


def test_a_file_is_replaced_atomically(tmp_path):
  path = tmp_path / "file.json"
  path.write_text("old")
  replace_text(path, json.dumps({"new": 1}))
  assert json.loads(path.read_text()) == {"new": 1}
  assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(b"old")
  with pytest.raises(ZeroDivisionError), atomic_writer(path) as file:
    file.write(b"half of the new")
    raise ZeroDivisionError
  assert path.read_bytes() == b"old"


def test_a_new_file_and_its_directory_are_synced(tmp_path, monkeypatch):
  """The order is file, rename, directory. Otherwise a power failure may leave the old file, or an empty one."""
  calls = []
  synced = lambda number: calls.append(os.readlink(f"/proc/self/fd/{number}"))
  monkeypatch.setattr(os, "fsync", synced)
  monkeypatch.setattr(os, "replace", lambda old, new: calls.append("replaced"))
  replace_text(tmp_path / "file", "new")
  assert calls == [f"{tmp_path}/file.partial", "replaced", f"{tmp_path}"]


@pytest.mark.parametrize(("code", "raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_directories_is_not_an_error(tmp_path, monkeypatch, code, raised):
  def fail(_):
    raise OSError(code, "failed")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(OSError, match="failed") if raised else contextlib.nullcontext():
    sync_directory(tmp_path)
