"""Verifying a checkpoint against its manifest names the file that differs."""

import errno
import json
import os
import random
from contextlib import nullcontext
from pathlib import Path

import pytest

from switchlora_jax.runs import files, manifest
from switchlora_jax.runs.files import write_checksummed_json
from switchlora_jax.runs.manifest import Damaged

ARRAYS = {"['params']['a']": [7, 3, 4]}


@pytest.fixture
def folder(tmp_path):
  """A complete step 5 with four files, one of them empty and one larger than a chunk."""
  folder = tmp_path / "5"
  contents = {
    "_METADATA": b"{}",
    "d/large": random.Random(0).randbytes(manifest.CHUNK + 100),
    "d/small": b"x",
    "e/no": b"",
  }
  for name, data in contents.items():
    (folder / "state" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "state" / name).write_bytes(data)
  manifest.write(folder, 5, ARRAYS)
  (folder / "written_later").write_text("not covered")
  return folder


def test_a_manifest_describes_its_checkpoint(folder):
  found = manifest.verify(folder)
  assert found == manifest.read(folder)
  assert (found.step, found.arrays, found.size) == (5, ARRAYS, 2 + manifest.CHUNK + 100 + 1)
  assert sorted(found.files) == ["state/_METADATA", "state/d/large", "state/d/small", "state/e/no"]


def test_a_flipped_bit_in_any_file_is_found(folder):
  rng = random.Random(0)
  for path in [*folder.glob("state/**/*"), folder / "manifest.json"]:
    contents_before = path.read_bytes() if path.is_file() else b""
    for position in rng.sample(range(len(contents_before)), min(len(contents_before), 20)):
      damaged = bytearray(contents_before)
      damaged[position] ^= 1 << rng.randrange(8)
      path.write_bytes(damaged)
      with pytest.raises(Damaged, match=f"{path.relative_to(folder)} is not what was written"):
        manifest.verify(folder)
      path.write_bytes(contents_before)
  manifest.verify(folder)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda folder: truncate(folder / "state/d/large"), r"^state/d/large has 262,243 bytes of 262,244$"),
    (lambda folder: truncate(folder / "manifest.json"), r"^manifest.json is not what was written$"),
    (lambda folder: (folder / "state/e/no").write_text("more"), r"^state/e/no has 4 bytes of 0$"),
    (lambda folder: (folder / "state/e/no").unlink(), r"^state/e/no: No such file or directory$"),
    (lambda folder: (folder / "state/d").rename(folder / "d"), r"^state/d/large: No such file .*, and 1 more files$"),
    (lambda folder: (folder / "manifest.json").unlink(), r"^it has no manifest.json: the save did not finish"),
    (
      lambda folder: write_checksummed_json(folder / "manifest.json", {"step": 5}),
      "^manifest.json is not what was written$",
    ),
  ],
)
def test_a_difference_is_described(folder, damage, message):
  damage(folder)
  with pytest.raises(Damaged, match=message):
    manifest.verify(folder)


def test_a_step_in_a_directory_named_after_another_is_refused(folder):
  with pytest.raises(Damaged, match=r"manifest.json is that of step 5"):
    manifest.verify(folder.rename(folder.with_name("6")))


@pytest.mark.parametrize("name", ["/etc/passwd", "written_later", "state/../../other"])
def test_files_outside_of_the_checkpoint_are_refused(folder, name):
  saved = manifest.read(folder)
  write_checksummed_json(folder / "manifest.json", saved._replace(files=saved.files | {name: [1, "0"]})._asdict())
  with pytest.raises(Damaged, match=rf"names files outside of state/, such as {name}$"):
    manifest.verify(folder)


@pytest.mark.parametrize("times", [2, 3])
def test_a_file_that_is_temporarily_unreadable_is_read_again(folder, monkeypatch, times):
  errors, xxh3 = [OSError(errno.ESTALE, os.strerror(errno.ESTALE))] * times, manifest._file_xxh3

  def unreliable(path):
    if path.name == "large" and errors:
      raise errors.pop()
    return xxh3(path)

  monkeypatch.setattr(manifest, "_file_xxh3", unreliable)
  monkeypatch.setattr(manifest, "PAUSE", 0.01)
  with nullcontext() if times == 2 else pytest.raises(Damaged, match=r"^state/d/large: Stale file handle$"):
    manifest.verify(folder)


def test_processes_verify_disjoint_sets_of_files(folder):
  """Each process reads only its own files."""
  for path in folder.glob("state/**/*"):
    if path.is_file():
      path.write_bytes(path.read_bytes() + b"more")
  for process, expected in enumerate((["_METADATA", "d/small"], ["d/large", "e/no"])):
    with pytest.raises(Damaged, match=f"^state/{expected[0]} has .*, and 1 more files"):
      manifest.verify(folder, (process, 2))


def test_a_step_without_a_manifest_is_incomplete(folder):
  checkpoints = folder.parent
  for name in ("10", "5.orbax-checkpoint-tmp", "06", "notes"):
    (checkpoints / name).mkdir()
  assert list(manifest.directories(checkpoints)) == [5, 10]
  assert manifest.finished(checkpoints) == [5]
  assert manifest.finished(checkpoints / "none") == []


def test_a_manifest_whose_write_was_interrupted_does_not_exist(folder, monkeypatch):
  """It is renamed to its final name only when complete."""
  (folder / "manifest.json").unlink()
  monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
  with pytest.raises(OSError, match="killed"):
    manifest.write(folder, 5, ARRAYS)
  assert manifest.finished(folder.parent) == []


def test_every_directory_is_synced(folder, monkeypatch):
  """After a power failure, the manifest must not exist without the files that it covers."""
  synced = []
  monkeypatch.setattr(os, "fsync", lambda number: synced.append(Path(os.readlink(f"/proc/self/fd/{number}"))))
  manifest.write(folder, 5, ARRAYS)
  assert synced[-1] == folder  # the manifest is renamed in it
  assert {path for path in synced if path.is_dir()} == {
    folder,
    folder / "state",
    folder / "state" / "d",
    folder / "state" / "e",
  }


def test_a_manifest_is_plain_json(folder):
  saved = json.loads((folder / "manifest.json").read_text())
  assert saved["step"] == 5 and saved["files"]["state/d/small"][0] == 1
