"""Interrupted saves and damaged checkpoints: a restore returns the saved state or rejects the checkpoint."""

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
from fault_runs import assert_same_end, finish, last_step, saved_steps, small_config, start
from forks import forks

from switchlora_jax.errors import UserError
from switchlora_jax.parallel.sharding import replicated
from switchlora_jax.runs import manifest
from switchlora_jax.runs.checkpoint import REMOVED, TEMPORARY, Checkpoints

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # audit events


def state_at(step: int):
  """A small state on one device, different for every step."""
  key = jax.random.key(step)
  state = {"params": {"a": jax.random.normal(key, (200, 40)), "b": jnp.arange(7)}, "step": jnp.array(step)}
  return jax.device_put(state, replicated(small_model.mesh(1)))


def restored_step(directory: Path, keep: int | None = None, step: int | None = None) -> int:
  """Restores a checkpoint and returns its step. The state must be `state_at` this step, to the bit."""
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0))
  with Checkpoints(directory, keep) as checkpoints:
    found = checkpoints.restore(lambda _: like, step)
  jax.tree.map(np.testing.assert_array_equal, found, state_at(int(found["step"])))
  return int(found["step"])


class DirectorySnapshots:
  """Copies a directory before every change by this process: the states that a SIGKILL may leave.

  An audit hook cannot be removed. It does nothing outside of the context.
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
      if not self._copying:  # copying opens files as well
        self._copying = True
        copy = self.copies / str(len(self.taken))
        shutil.copytree(self.directory, copy, copy_function=copy_if_exists)
        self.taken.append(copy)
        self._copying = False

  def _opens_to_write(self, path, _, flags):
    return str(path).startswith(str(self.directory)) and flags & (os.O_WRONLY | os.O_RDWR)


def copy_if_exists(source, target):
  """Copies a file, unless tensorstore has renamed it in the meantime."""
  with contextlib.suppress(FileNotFoundError):
    return shutil.copy(source, target)


def test_a_kill_at_any_time_during_a_save_loses_at_most_that_step(tmp_path):
  """Case 2. At any time, the step that is being saved or the one before it is complete."""
  directory = tmp_path / "checkpoints"
  with Checkpoints(directory, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state_at(step))
  with DirectorySnapshots(directory, tmp_path / "copies") as snapshots, Checkpoints(directory, keep=2) as checkpoints:
    checkpoints.save(4, state_at(4))
  names = [{path.name for path in copy.iterdir()} for copy in snapshots.taken]
  assert any(f"4{TEMPORARY}" in seen for seen in names), "no snapshot during the write"
  assert any(f"2{REMOVED}" in seen for seen in names), "no snapshot during the removal of an older step"
  assert any((copy / f"4{TEMPORARY}" / manifest.NAME).exists() for copy in snapshots.taken), (
    "no snapshot between the manifest and the rename"
  )
  for copy, seen in zip(snapshots.taken, names, strict=True):
    assert restored_step(copy, keep=2) == (4 if "4" in seen else 3)
    assert all(path.name.isdigit() for path in copy.iterdir()), "an incomplete step is left"


def kill_at(moment: str):
  """Kills this process before an audit event, given as `EVENT PART-OF-A-PATH`."""
  event, part = moment.split(" ")

  def hook(seen, arguments):
    if seen == event and part in str(arguments[0]):
      os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(hook)


def test_kills_during_saves_lose_no_other_step(uninterrupted_run, tmp_path):
  """Case 2. Before the manifest is renamed, before the step is renamed, and while an old step is removed."""
  folder, uninterrupted = uninterrupted_run
  workdir = tmp_path / "killed"
  kills = (
    (f"os.rename 5{TEMPORARY}/manifest.json", []),
    (f"os.rename 10{TEMPORARY}", [5]),
    (f"shutil.rmtree 5{REMOVED}", [10, 15, 20]),
  )
  for kill, left in kills:
    run = start(small_config(folder), workdir, fault=f"test_checkpoint_faults:kill_at={kill}")
    assert run.exit_code() == -signal.SIGKILL, f"no event {kill}: {run.output()}"
    assert saved_steps(workdir) == left
  finish(small_config(folder), workdir)
  assert_same_end(workdir, uninterrupted)
  assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())


LIMIT = 20_000  # bytes: every save has a larger file, while metrics.jsonl has 5,000 at step 15


def fill_the_disk(when: str):
  """`STEP,SIZE`: from the save of this step on, no file can grow beyond this number of bytes."""
  step, size = map(int, when.split(","))
  save = Checkpoints.save

  def save_on_full(self, now, state):
    if now == step:
      self.wait()  # the save before this one succeeds
      resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    save(self, now, state)

  Checkpoints.save = save_on_full


def test_a_full_disk_is_reported_before_the_next_save_and_loses_one_save(uninterrupted_run, tmp_path):
  """Case 7. The run ends before its next save with an error; with free space, the same command continues."""
  folder, uninterrupted = uninterrupted_run
  workdir = tmp_path / "full"
  run = start(small_config(folder), workdir, fault=f"test_checkpoint_faults:fill_the_disk=10,{LIMIT}")
  assert run.exit_code() == 2
  assert re.search(
    r"error: the checkpoint of step 10 could not be saved in \S+: File too large; that of step 5 is complete; "
    r"free space .* the same command continues from step 5$", run.output(), re.M,
  ), run.output()  # fmt: skip
  assert saved_steps(workdir) == [5] and last_step(workdir) <= 15
  finish(small_config(folder), workdir)
  assert_same_end(workdir, uninterrupted)


def flip(path: Path, byte: int, bit: int):
  """Flips one bit of a file."""
  contents = bytearray(path.read_bytes())
  contents[byte] ^= 1 << bit
  path.write_bytes(contents)


@pytest.fixture
def three_steps(tmp_path):
  """Checkpoints of steps 1 to 3."""
  with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state_at(step))
  return tmp_path / "checkpoints"


@pytest.mark.in_default_tests
def test_a_flipped_bit_is_detected_unless_the_file_is_never_read(three_steps):
  """Case 8. At several positions of every file of the newest checkpoint; the one before it is restored instead."""
  places, newest = random.Random(0), three_steps / "3"
  for path in [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]:
    unread = path.parent == newest and path.name != manifest.NAME
    whole = path.read_bytes()
    for byte in {0, len(whole) - 1, *(places.randrange(len(whole)) for _ in range(8))}:
      flip(path, byte, places.randrange(8))
      if unread:
        assert restored_step(three_steps, step=3) == 3
      else:
        with pytest.raises(UserError, match=f"step 3: {path.relative_to(newest)} is not what was written"):
          restored_step(three_steps, step=3)
      path.write_bytes(whole)
    flip(path, len(whole) // 2, 3)
    assert restored_step(three_steps) == (3 if unread else 2)
    path.write_bytes(whole)


def truncate(path: Path):
  """Truncates a file to half its length."""
  os.truncate(path, path.stat().st_size // 2)


def empty(path: Path):
  """Truncates a file to 0 bytes."""
  os.truncate(path, 0)


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
def test_a_truncated_empty_or_missing_file_is_refused(three_steps, damage):
  """Case 9. Every file that is read, and the manifest."""
  for path in [*(three_steps / "3" / "state").rglob("*"), three_steps / "3" / manifest.NAME]:
    if path.is_file():
      whole = path.read_bytes()
      damage(path)
      assert restored_step(three_steps) == 2, path
      path.write_bytes(whole)
  assert restored_step(three_steps) == 3


def test_every_file_of_a_real_checkpoint_is_verified(uninterrupted_run, tmp_path):
  """Cases 8 and 9. Every file is damaged in eight ways. `experiments.checkpoints` names it, unless it is never read."""
  shutil.copytree(uninterrupted_run[1], tmp_path / "run")
  places, newest = random.Random(0), tmp_path / "run" / "checkpoints" / "40"
  flipped = lambda path: flip(path, places.randrange(path.stat().st_size), places.randrange(8))
  files = [path for path in newest.rglob("*") if path.is_file()]
  assert len(files) > 10
  with forks(tmp_path) as command:
    for path in files:
      unread = path.parent == newest and path.name != manifest.NAME
      whole_file = path.read_bytes()
      for damage in [Path.unlink] + ([flipped] * 5 + [truncate, empty]) * bool(whole_file):
        damage(path)
        found = command("checkpoints", f"--run={tmp_path / 'run'}")
        assert found.code == (not unread), (path, damage, found)
        assert unread or path.relative_to(newest).as_posix() in found.stdout, (path, damage, found)
        path.write_bytes(whole_file)
    assert command("checkpoints", f"--run={tmp_path / 'run'}").code == 0


def test_a_run_skips_damaged_checkpoints(uninterrupted_run, tmp_path):
  """Cases 8 and 9. A flipped bit in the newest, a truncated file in the one before, and a directory without files."""
  folder, uninterrupted = uninterrupted_run
  workdir = tmp_path / "damaged"
  shutil.copytree(uninterrupted, workdir)
  largest = lambda step: max((workdir / "checkpoints" / step).rglob("d/*"), key=lambda path: path.stat().st_size)
  flip(largest("40"), 1000, 2)
  truncate(largest("35"))
  (workdir / "checkpoints" / "45").mkdir()
  run = finish(small_config(folder), workdir)
  for step, reason in ((45, "it has no manifest.json"), (40, "is not what was written"), (35, r"has [\d,]+ bytes of")):
    assert re.search(f"checkpoint of step {step} is damaged .*{reason}.* moved to .*damaged-{step}-0", run.output())
  assert_same_end(workdir, uninterrupted)
