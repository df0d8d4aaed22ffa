"""Checkpoints whose save is cut off, or that are damaged where they lie: what comes back was saved, or is refused."""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from forks import forks
from hurt_runs import assert_same_end, finish, last_step, saved_steps, small, start

from switchlora_jax.errors import UserError
from switchlora_jax.parallel.sharding import replicated
from switchlora_jax.runs import manifest
from switchlora_jax.runs.checkpoint import REMOVED, TEMPORARY, Checkpoints

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # audit events


def state_at(step: int):
  """A small state, another for every step, on one device."""
  key = jax.random.key(step)
  state = {"params": {"a": jax.random.normal(key, (200, 40)), "b": jnp.arange(7)}, "step": jnp.array(step)}
  return jax.device_put(state, replicated(small_model.mesh(1)))


def restored(directory: Path, keep: int | None = None, step: int | None = None) -> int:
  """The step of the state that comes back, which must be that state to the bit."""
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0))
  with Checkpoints(directory, keep) as checkpoints:
    found = checkpoints.restore(lambda _: like, step)
  jax.tree.map(np.testing.assert_array_equal, found, state_at(int(found["step"])))
  return int(found["step"])


class Moments:
  """Copies a directory whenever this process is about to change it: what a SIGKILL at each moment would leave.

  A hook can never be taken away again, so that it is there once and does nothing outside of the context.
  """

  def __init__(self, directory: Path, copies: Path):
    self.directory, self.copies, self.taken = directory, copies, []
    self._one_at_a_time, self._copying = threading.RLock(), False

  def __enter__(self):
    self._on = True
    sys.addaudithook(self._saw)
    return self

  def __exit__(self, *_):
    self._on = False

  def _saw(self, event, arguments):
    if not self._on or event not in CHANGES or (event == "open" and not self._opens_to_write(*arguments)):
      return
    with self._one_at_a_time:
      if not self._copying:  # which opens files as well
        self._copying = True
        copy = self.copies / str(len(self.taken))
        shutil.copytree(self.directory, copy, copy_function=copy_if_there)
        self.taken.append(copy)
        self._copying = False

  def _opens_to_write(self, path, _, flags):
    return str(path).startswith(str(self.directory)) and flags & (os.O_WRONLY | os.O_RDWR)


def copy_if_there(source, target):
  """Tensorstore renames its files while others are copied."""
  with contextlib.suppress(FileNotFoundError):
    return shutil.copy(source, target)


def test_a_kill_at_any_moment_of_a_save_loses_no_other_step(tmp_path):
  """Case 2. The step that was being saved, or the one before it: at no moment is there none, or half of one."""
  directory = tmp_path / "checkpoints"
  with Checkpoints(directory, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state_at(step))
  with Moments(directory, tmp_path / "copies") as moments, Checkpoints(directory, keep=2) as checkpoints:
    checkpoints.save(4, state_at(4))
  names = [{path.name for path in copy.iterdir()} for copy in moments.taken]
  assert any(f"4{TEMPORARY}" in seen for seen in names), "none while it was written"
  assert any(f"2{REMOVED}" in seen for seen in names), "none while an older one was removed"
  assert any((copy / f"4{TEMPORARY}" / manifest.NAME).exists() for copy in moments.taken), "none between the two"
  for copy, seen in zip(moments.taken, names, strict=True):
    assert restored(copy, keep=2) == (4 if "4" in seen else 3)
    assert all(path.name.isdigit() for path in copy.iterdir()), "what was half there is gone"


def kill_at(moment: str):
  """Kill this process as it is about to do something, `EVENT PART-OF-A-PATH`."""
  event, part = moment.split(" ")

  def hook(seen, arguments):
    if seen == event and part in str(arguments[0]):
      os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(hook)


def test_killed_while_saving(whole, tmp_path):
  """Case 2. Killed in three saves of one run: before its manifest, before its name, while an old one is removed."""
  folder, uninterrupted = whole
  workdir = tmp_path / "killed"
  moments = (
    (f"os.rename 5{TEMPORARY}/manifest.json", []),
    (f"os.rename 10{TEMPORARY}", [5]),
    (f"shutil.rmtree 5{REMOVED}", [10, 15, 20]),
  )
  for moment, left in moments:
    run = start(small(folder), workdir, fault=f"test_checkpoints_hurt:kill_at={moment}")
    assert run.end() == -signal.SIGKILL, f"{moment} never came: {run.said()}"
    assert saved_steps(workdir) == left
  finish(small(folder), workdir)
  assert_same_end(workdir, uninterrupted)
  assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())


def fill_the_disk(when: str):
  """`STEP,SIZE`: from when the checkpoint of a step is saved, no file may grow beyond so many bytes."""
  step, size = map(int, when.split(","))
  save = Checkpoints.save

  def save_on_full(self, now, state):
    if now == step:
      self.wait()  # the save before this one had room
      resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    save(self, now, state)

  Checkpoints.save = save_on_full


def test_a_full_disk_is_said_at_once_and_loses_one_save(whole, tmp_path):
  """Case 7. The run ends before its next save with a sentence; with room again, the same command continues."""
  folder, uninterrupted = whole
  workdir = tmp_path / "full"
  run = start(small(folder), workdir, fault="test_checkpoints_hurt:fill_the_disk=10,50000")
  assert run.end() == 2
  assert re.search(
    r"error: the checkpoint of step 10 could not be saved in \S+: File too large; that of step 5 is complete; "
    r"free space .* the same command continues from step 5$", run.said(), re.M,
  ), run.said()  # fmt: skip
  assert saved_steps(workdir) == [5] and last_step(workdir) <= 15
  finish(small(folder), workdir)
  assert_same_end(workdir, uninterrupted)


def flip(path: Path, byte: int, bit: int):
  """Change one bit of a file."""
  contents = bytearray(path.read_bytes())
  contents[byte] ^= 1 << bit
  path.write_bytes(contents)


@pytest.fixture
def three(tmp_path):
  """Checkpoints of steps 1 to 3."""
  with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state_at(step))
  return tmp_path / "checkpoints"


@pytest.mark.telling
def test_a_flipped_bit_anywhere_is_refused_or_means_nothing(three):
  """Case 8. In every file of the newest checkpoint, at several places; the one before it is read instead."""
  places, newest = random.Random(0), three / "3"
  for path in [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]:
    never_read = path.parent == newest and path.name != manifest.NAME
    whole = path.read_bytes()
    for byte in {0, len(whole) - 1, *(places.randrange(len(whole)) for _ in range(8))}:
      flip(path, byte, places.randrange(8))
      if never_read:
        assert restored(three, step=3) == 3
      else:
        with pytest.raises(UserError, match=f"step 3: {path.relative_to(newest)} is not what was written"):
          restored(three, step=3)
      path.write_bytes(whole)
    flip(path, len(whole) // 2, 3)
    assert restored(three) == (3 if never_read else 2)
    path.write_bytes(whole)


def truncate(path: Path):
  """Half a file."""
  os.truncate(path, path.stat().st_size // 2)


def empty(path: Path):
  """Nothing of a file."""
  os.truncate(path, 0)


@pytest.mark.parametrize("hurt", [truncate, empty, Path.unlink])
def test_a_truncated_empty_or_missing_file_is_refused(three, hurt):
  """Case 9. Any file that is read, or the manifest."""
  for path in [*(three / "3" / "state").rglob("*"), three / "3" / manifest.NAME]:
    if path.is_file():
      whole = path.read_bytes()
      hurt(path)
      assert restored(three) == 2, path
      path.write_bytes(whole)
  assert restored(three) == 3


def test_every_file_of_a_real_checkpoint_is_looked_at(whole, tmp_path):
  """Cases 8 and 9. Each is flipped at five places, cut, emptied and removed: the command that lists checkpoints, which
  verifies as a restore does, names it; but what is never read."""
  shutil.copytree(whole[1], tmp_path / "run")
  places, newest = random.Random(0), tmp_path / "run" / "checkpoints" / "40"
  flipped = lambda path: flip(path, places.randrange(path.stat().st_size), places.randrange(8))
  files = [path for path in newest.rglob("*") if path.is_file()]
  assert len(files) > 10
  with forks(tmp_path) as command:
    for path in files:
      never_read = path.parent == newest and path.name != manifest.NAME
      whole_file = path.read_bytes()
      for hurt in [Path.unlink] + ([flipped] * 5 + [truncate, empty]) * bool(whole_file):
        hurt(path)
        found = command("checkpoints", f"--run={tmp_path / 'run'}")
        assert found.code == (not never_read), (path, hurt, found)
        assert never_read or path.relative_to(newest).as_posix() in found.stdout, (path, hurt, found)
        path.write_bytes(whole_file)
    assert command("checkpoints", f"--run={tmp_path / 'run'}").code == 0


@pytest.mark.telling
def test_a_run_passes_over_what_is_damaged(whole, tmp_path):
  """Cases 8 and 9. A bit flipped in the newest, a file of the one before cut off, and a bare directory beyond them."""
  folder, uninterrupted = whole
  workdir = tmp_path / "damaged"
  shutil.copytree(uninterrupted, workdir)
  largest = lambda step: max((workdir / "checkpoints" / step).rglob("d/*"), key=lambda path: path.stat().st_size)
  flip(largest("40"), 1000, 2)
  truncate(largest("35"))
  (workdir / "checkpoints" / "45").mkdir()
  run = finish(small(folder), workdir)
  for step, reason in ((45, "it has no manifest.json"), (40, "is not what was written"), (35, r"has [\d,]+ bytes of")):
    assert re.search(f"checkpoint of step {step} is damaged .*{reason}.* moved to .*damaged-{step}-0", run.said())
  assert_same_end(workdir, uninterrupted)
