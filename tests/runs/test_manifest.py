"""A checkpoint is what its manifest says, or the file that is not is named."""

import errno
import json
import os
import random
from contextlib import nullcontext

import pytest

from switchlora_jax.runs import files, manifest
from switchlora_jax.runs.files import write_checksummed_json
from switchlora_jax.runs.manifest import Damaged

ARRAYS = {"['params']['a']": [7, 3, 4]}


@pytest.fixture
def folder(tmp_path):
  """A finished step 5 of four files, one of them empty and one larger than what is read at a time."""
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


def test_it_says_what_was_written(folder):
  found = manifest.verify(folder)
  assert found == manifest.read(folder)
  assert (found.step, found.arrays, found.size) == (5, ARRAYS, 2 + manifest.CHUNK + 100 + 1)
  assert sorted(found.files) == ["state/_METADATA", "state/d/large", "state/d/small", "state/e/no"]


def test_a_flipped_bit_is_found_wherever_it_is(folder):
  places = random.Random(0)
  for path in [*folder.glob("state/**/*"), folder / "manifest.json"]:
    whole = path.read_bytes() if path.is_file() else b""
    for position in places.sample(range(len(whole)), min(len(whole), 20)):
      hurt = bytearray(whole)
      hurt[position] ^= 1 << places.randrange(8)
      path.write_bytes(hurt)
      with pytest.raises(Damaged, match=f"{path.relative_to(folder)} is not what was written"):
        manifest.verify(folder)
      path.write_bytes(whole)
  manifest.verify(folder)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
  "hurt, said",
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
def test_what_is_wrong_is_named(folder, hurt, said):
  hurt(folder)
  with pytest.raises(Damaged, match=said):
    manifest.verify(folder)


def test_a_step_under_the_name_of_another_is_refused(folder):
  with pytest.raises(Damaged, match=r"manifest.json is that of step 5"):
    manifest.verify(folder.rename(folder.with_name("6")))


@pytest.mark.parametrize("name", ["/etc/passwd", "written_later", "state/../../other"])
def test_no_file_elsewhere_is_looked_at(folder, name):
  saved = manifest.read(folder)
  write_checksummed_json(folder / "manifest.json", saved._replace(files=saved.files | {name: [1, "0"]})._asdict())
  with pytest.raises(Damaged, match=rf"names files outside of state/, such as {name}$"):
    manifest.verify(folder)


@pytest.mark.parametrize("times", [2, 3])
def test_a_file_that_cannot_be_read_for_a_moment_is_not_damaged(folder, monkeypatch, times):
  errors, xxh3 = [OSError(errno.ESTALE, os.strerror(errno.ESTALE))] * times, manifest._file_xxh3

  def unsteady(path):
    if path.name == "large" and errors:
      raise errors.pop()
    return xxh3(path)

  monkeypatch.setattr(manifest, "_file_xxh3", unsteady)
  monkeypatch.setattr(manifest, "PAUSE", 0.01)
  with nullcontext() if times == 2 else pytest.raises(Damaged, match=r"^state/d/large: Stale file handle$"):
    manifest.verify(folder)


def test_processes_share_the_files(folder):
  """Each looks at its own, and none at those of another."""
  for path in folder.glob("state/**/*"):
    if path.is_file():
      path.write_bytes(path.read_bytes() + b"more")
  for process, expected in enumerate((["_METADATA", "d/small"], ["d/large", "e/no"])):
    with pytest.raises(Damaged, match=f"^state/{expected[0]} has .*, and 1 more files"):
      manifest.verify(folder, (process, 2))


def test_only_what_has_a_manifest_is_finished(folder):
  checkpoints = folder.parent
  for name in ("10", "5.orbax-checkpoint-tmp", "06", "notes"):
    (checkpoints / name).mkdir()
  assert list(manifest.directories(checkpoints)) == [5, 10]
  assert manifest.finished(checkpoints) == [5]
  assert manifest.finished(checkpoints / "none") == []


def test_a_manifest_cut_off_while_it_was_written_is_none(folder, monkeypatch):
  """It has its name only when it is whole."""
  (folder / "manifest.json").unlink()
  monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
  with pytest.raises(OSError, match="killed"):
    manifest.write(folder, 5, ARRAYS)
  assert manifest.finished(folder.parent) == []


def test_every_name_is_brought_to_the_disk(folder, monkeypatch):
  """Else a machine that loses power may have the manifest, and not what it speaks of."""
  synced = set()
  monkeypatch.setattr(manifest, "sync", synced.add)
  manifest.write(folder, 5, ARRAYS)
  assert synced == {folder, folder / "state", folder / "state" / "d", folder / "state" / "e"}


def test_it_is_json_that_others_may_read(folder):
  saved = json.loads((folder / "manifest.json").read_text())
  assert saved["step"] == 5 and saved["files"]["state/d/small"][0] == 1
