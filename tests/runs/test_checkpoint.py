"""A restored state is bitwise the saved one, or the checkpoint is refused with an error."""

import contextlib
import os
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchlora_jax.errors import RunFailed, Stopped, UserError
from switchlora_jax.parallel.sharding import make_mesh, replicated
from switchlora_jax.runs import checkpoint, manifest
from switchlora_jax.runs.checkpoint import REMOVED, Checkpoints

pytestmark = pytest.mark.user_flags


def some_state(seed: int):
  """A tree like a train state: nested and empty dicts, and float32, bfloat16, int8 and int32 arrays."""
  keys = jax.random.split(jax.random.key(seed), 2)
  state = {
    "params": {"a": jax.random.normal(keys[0], (300, 40)), "b": jax.random.normal(keys[1], (7,), jnp.bfloat16)},
    "candidates": {},
    "frozen": {"kernel_tail": jnp.full((4, 5), seed, jnp.int8)},
    "step": jnp.array(seed, jnp.int32),
  }
  return jax.device_put(state, replicated(make_mesh()))


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def directory(tmp_path):
  """Checkpoints of steps 1 to 4, of which the newest three are kept."""
  with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
    for step in range(1, 5):
      checkpoints.save(step, some_state(step))
  return tmp_path / "checkpoints"


def assert_same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_the_newest_state_is_restored_bitwise(directory):
  with Checkpoints(directory, keep=3) as checkpoints:
    assert checkpoints.steps() == [2, 3, 4]
    restored = checkpoints.restore(lambda _: abstract(some_state(0)))
  assert_same(restored, some_state(4))
  assert restored["params"]["a"].sharding == some_state(4)["params"]["a"].sharding


def test_restoring_from_an_empty_directory_returns_none(tmp_path):
  with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
    assert checkpoints.restore(lambda _: abstract(some_state(0))) is None


def test_a_step_and_a_part_of_the_state_can_be_restored(directory):
  part = {name: value for name, value in abstract(some_state(0)).items() if name in ("params", "candidates")}
  expected = {"params": some_state(3)["params"], "candidates": {}}
  with Checkpoints(directory) as checkpoints:
    restored = checkpoints.restore(lambda _: part, step=3, partial=True)
  assert jax.tree.structure(restored) == jax.tree.structure(expected)
  assert_same(restored, expected)


def test_arrays_without_a_sharding_are_restored_as_numpy_arrays(directory):
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), some_state(0))
  with Checkpoints(directory) as checkpoints:
    restored = checkpoints.restore(lambda _: like)
  assert {type(x) for x in jax.tree.leaves(restored)} == {np.ndarray}
  assert restored["params"]["b"].dtype == jnp.bfloat16
  assert_same(restored, some_state(4))
  flip_a_bit(largest_file(directory / "4"))
  with Checkpoints(directory) as checkpoints:
    assert_same(checkpoints.restore(lambda _: like), some_state(3))


def test_a_partial_state_that_the_checkpoint_does_not_have_is_refused(directory):
  """The part that is read has a missing, an additional or a renamed array. Other parts are not compared."""
  state = abstract(some_state(0))
  leaf = state["params"]["b"]
  for params in ({"a": state["params"]["a"]}, state["params"] | {"c": leaf}, {"a": state["params"]["a"], "c": leaf}):
    with Checkpoints(directory) as checkpoints, pytest.raises(UserError, match=r"another version of the code saved it"):
      checkpoints.restore(lambda _, params=params: {"params": params}, partial=True)
  with Checkpoints(directory) as checkpoints, pytest.raises(UserError, match=r"another version of the code saved it"):
    checkpoints.restore(lambda _: {"params": state["params"]})  # not partial


def test_a_damaged_array_in_the_part_that_is_read_is_refused(directory):
  flip_a_bit(largest_file(directory / "4"))
  part = {"params": abstract(some_state(0))["params"]}
  with Checkpoints(directory) as checkpoints:
    with pytest.raises(UserError, match=r"step 4: .*; choose another"):
      checkpoints.restore(lambda _: part, step=4, partial=True)
    assert_same(checkpoints.restore(lambda _: part, partial=True), {"params": some_state(3)["params"]})
  assert (directory / "4").exists(), "a checkpoint of another run must stay"


def test_an_array_of_another_shape_is_named(directory):
  like = abstract(some_state(0))
  like["params"]["a"] = jax.ShapeDtypeStruct((300, 41), jnp.float32, sharding=like["params"]["a"].sharding)
  sentence = r"\['params'\]\['a'\] has the shape \[300, 40\] there and \[300, 41\] in this code's state"
  with Checkpoints(directory) as checkpoints, pytest.raises(UserError, match=sentence):
    checkpoints.restore(lambda _: like)


def largest_file(folder):
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path, position=0.5):
  data = bytearray(path.read_bytes())
  data[int(len(data) * position)] ^= 4
  path.write_bytes(data)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
  "damage", [flip_a_bit, truncate, lambda path: path.unlink()], ids=["flip", "truncate", "delete"]
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(directory, caplog, damage):
  damage(largest_file(directory / "4"))
  with Checkpoints(directory, keep=3) as checkpoints:
    restored = checkpoints.restore(lambda _: abstract(some_state(0)))
    assert_same(restored, some_state(3))
    assert "checkpoint of step 4 is damaged" in caplog.text
    assert (directory.parent / "damaged-4-0").is_dir()
    checkpoints.save(4, some_state(40))
  with Checkpoints(directory, keep=3) as checkpoints:
    assert_same(checkpoints.restore(lambda _: abstract(some_state(0))), some_state(40))


def test_if_all_checkpoints_are_damaged_the_run_does_not_start_again(directory):
  for step in (2, 3, 4):
    truncate(largest_file(directory / str(step)))
  with (
    Checkpoints(directory, keep=3) as checkpoints,
    pytest.raises(UserError, match=r"step 4: .*step 2: .*new --workdir"),
  ):
    checkpoints.restore(lambda _: abstract(some_state(0)))
  assert sorted(path.name for path in directory.iterdir()) == ["2", "3", "4"]


@pytest.mark.parametrize("end", [Stopped, RunFailed])
def test_a_run_that_ends_during_a_restore_does_not_report_damage(directory, monkeypatch, end):
  """A signal or a hang is reported while the main thread reads. The checkpoint is not moved."""

  def interrupted(*_):
    raise end("why")

  with Checkpoints(directory, keep=3) as checkpoints, pytest.raises(end, match="why"):
    monkeypatch.setattr(checkpoints, "_restore", interrupted)
    checkpoints.restore(lambda _: abstract(some_state(0)))
  assert sorted(path.name for path in directory.iterdir()) == ["2", "3", "4"]


def test_a_state_of_another_version_is_distinguished_from_damage(directory):
  like = abstract(some_state(0))
  like["params"]["b"] = {"new": like["params"]["b"]}
  with (
    Checkpoints(directory) as checkpoints,
    pytest.raises(UserError, match=r"step 4: .*another version of the code .*, or use the code that saved them"),
  ):
    checkpoints.restore(lambda _: like)


def test_an_unfinished_save_is_not_a_checkpoint(directory):
  (directory / "5.orbax-checkpoint-tmp").mkdir()
  (directory / "5.orbax-checkpoint-tmp" / "state").mkdir()
  with Checkpoints(directory, keep=3) as checkpoints:
    assert checkpoints.steps() == [2, 3, 4]


@contextlib.contextmanager
def no_file_larger_than(size: int):
  """Larger files fail, as on a full disk."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


FULL = r"step 5 could not be saved in \S+: File too large; that of step 4 is complete; free space .* from step 4"


def test_a_failed_save_is_reported_at_the_next_check(directory, caplog):
  """Before the next save. The earlier checkpoints remain, and once there is space the next save succeeds."""
  with Checkpoints(directory, keep=3) as checkpoints:
    checkpoints.check()
    with no_file_larger_than(20_000), pytest.raises(UserError, match=FULL):
      checkpoints.save(5, some_state(5))
      for _ in range(1000):
        checkpoints.check()
        time.sleep(0.01)
  assert "Traceback" not in caplog.text
  with Checkpoints(directory, keep=3) as checkpoints:
    assert checkpoints.steps() == [2, 3, 4]
    assert_same(checkpoints.restore(lambda _: abstract(some_state(0))), some_state(4))
    checkpoints.save(5, some_state(5))
  assert sorted(path.name for path in directory.iterdir()) == ["3", "4", "5"]


def test_a_failure_of_the_last_save_is_reported(directory):
  """No later step checks it."""
  with pytest.raises(UserError, match=FULL), no_file_larger_than(20_000), Checkpoints(directory, keep=3) as checkpoints:
    checkpoints.save(5, some_state(5))


def test_a_failure_of_the_first_save_is_reported(tmp_path):
  (tmp_path / "checkpoints").touch()
  error = pytest.raises(UserError, match=r"step 5 .*there is none before it; .* continues from the start$")
  with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints, error:
    checkpoints.save(5, some_state(5))


def test_a_failed_save_does_not_hide_the_exception_that_ended_the_run(directory, caplog):
  with pytest.raises(KeyError), no_file_larger_than(20_000), Checkpoints(directory, keep=3) as checkpoints:
    checkpoints.save(5, some_state(5))
    raise KeyError
  assert "checkpoint of step 5 could not be saved" in caplog.text


def test_an_old_checkpoint_that_cannot_be_removed_gives_a_warning(directory, caplog, monkeypatch):
  """The new checkpoint is saved. What remains of the old one is not treated as a checkpoint."""

  def busy(*_, **__):
    raise OSError(39, "Directory not empty")

  with monkeypatch.context() as patch, Checkpoints(directory, keep=3) as checkpoints:
    patch.setattr(os, "rmdir", busy)
    checkpoints.save(5, some_state(5))
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4, 5] and (directory / "2.removed").exists()
    assert_same(checkpoints.restore(lambda _: abstract(some_state(0))), some_state(5))
  assert "could not be removed ([Errno 39] Directory not empty" in caplog.text
  with Checkpoints(directory, keep=3) as checkpoints:
    assert_same(checkpoints.restore(lambda _: abstract(some_state(0))), some_state(5))
  assert sorted(path.name for path in directory.iterdir()) == ["3", "4", "5"]


def test_an_old_checkpoint_is_removed_after_the_directory_is_synced(directory, monkeypatch):
  done, sync, rmtree = [], checkpoint.sync_directory, shutil.rmtree
  monkeypatch.setattr(checkpoint, "sync_directory", lambda path: (done.append(path), sync(path)))
  monkeypatch.setattr(shutil, "rmtree", lambda path: (done.append(path), rmtree(path)))
  with Checkpoints(directory, keep=3) as checkpoints:
    checkpoints.save(5, some_state(5))
    checkpoints.wait()
  at = done.index(directory / f"2{REMOVED}")
  assert done[at - 1] == directory and (directory / "5") not in done[at:]


@pytest.mark.parametrize("error", [MemoryError, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")])
def test_running_out_of_memory_is_not_treated_as_damage(directory, monkeypatch, error):
  def fail(*_):
    raise error

  monkeypatch.setattr(manifest, "verify", fail)
  with Checkpoints(directory, keep=3) as checkpoints:
    with pytest.raises((MemoryError, jax.errors.JaxRuntimeError)):
      checkpoints.restore(lambda _: abstract(some_state(0)))
    assert checkpoints.steps() == [2, 3, 4]


def test_a_manifest_that_cannot_be_written_fails_the_save(directory, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(manifest, "write", full)
  with pytest.raises(UserError, match="No space left on device"), Checkpoints(directory, keep=3) as checkpoints:
    checkpoints.save(5, some_state(5))
  assert not (directory / "5").exists()


def test_array_checksums_find_what_file_checksums_cannot(directory, caplog):
  """The files match their checksums, but contain another state than the devices had."""
  shutil.rmtree(directory / "4" / "state")
  shutil.copytree(directory / "3" / "state", directory / "4" / "state")
  manifest.write(directory / "4", 4, manifest.read(directory / "4").arrays)
  with Checkpoints(directory, keep=3) as checkpoints:
    assert_same(checkpoints.restore(lambda _: abstract(some_state(0))), some_state(3))
  assert "step 4 is damaged (ValueError: checksum or shape of" in caplog.text


def test_checkpoints_of_another_run_are_not_modified(directory):
  """Not even incomplete ones, because their save may still be running."""
  (directory / "5.orbax-checkpoint-tmp").mkdir()
  (directory / "6").mkdir()
  before = {path: path.stat().st_mtime_ns for path in [directory, *directory.rglob("*")]}
  with Checkpoints(directory) as checkpoints:
    assert_same(checkpoints.restore(lambda _: abstract(some_state(0))), some_state(4))
  assert {path: path.stat().st_mtime_ns for path in [directory, *directory.rglob("*")]} == before


def test_a_save_writes_the_values_at_its_start(tmp_path):
  """The arrays are donated to the next step while the save still runs."""
  state = jax.device_put({"x": jnp.ones((2000, 500))}, replicated(make_mesh()))
  forward = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
    checkpoints.save(1, state)
    for _ in range(5):
      state = forward(state)
  with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
    assert np.all(np.asarray(checkpoints.restore(lambda _: abstract(state))["x"]) == 1)
