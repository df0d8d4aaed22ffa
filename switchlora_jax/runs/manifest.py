"""The manifest of a checkpoint: size and XXH3 of every file, and the checksum of every array.

`manifest.json` is written last, into the directory of a step that still has a temporary name; a step directory without
a manifest is incomplete. It is in the same directory as the files that it covers, so that both are copied, moved and
removed together. It covers `state/`, which is all that a restore reads; what orbax writes beside it later
(`_CHECKPOINT_METADATA`, `commit_success.txt`) is not covered. The `manifest.json` of prepared data (`data.shards`) is
another format.

Nothing here needs a device. XXH3 is as fast as reading the files, unlike CRC-32; see `runs.files` for the other
kinds of checksums.
"""

import datetime
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import xxhash

from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import read_checksummed_json, sync_directory, write_checksummed_json

NAME = "manifest.json"
COVERED = "state"
CHUNK = 1 << 18  # bytes per read; a chunk stays in the cache of a core until it is hashed
TRIES, PAUSE = 3, 1.0  # attempts at a file that is temporarily unreadable, as on network drives; seconds in between
READERS = 4  # threads; starting more of them takes longer than reading the files of a small state


class Damaged(ValueError):
  """A step directory is incomplete, or differs from its manifest; the message names the first difference."""


class Manifest(NamedTuple):
  """The contents of the manifest of a checkpoint.

  Attributes:
    step: number of steps done; the state is the one before step `step`.
    saved: time of the save, ISO 8601 in UTC.
    files: {path relative to the step directory: [bytes, XXH3 in hexadecimal]}.
    arrays: {path of the leaf: [checksum, *shape]}, as from `array_checksums`.
  """

  step: int
  saved: str
  files: dict[str, list]
  arrays: dict[str, list[int]]

  @property
  def size(self) -> int:
    """Total bytes of all files."""
    return sum(size for size, _ in self.files.values())


def write(folder: Path, step: int, arrays: dict[str, list[int]]) -> None:
  """Completes the checkpoint in `folder`: syncs its files to the disk, then writes the manifest."""
  paths = [folder / COVERED, *sorted((folder / COVERED).rglob("*"))]
  with ThreadPoolExecutor(READERS) as pool:
    entries = pool.map(_sync_and_hash, paths)
    files = {str(path.relative_to(folder)): entry for path, entry in zip(paths, entries, strict=True) if entry}
  saved = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  write_checksummed_json(folder / NAME, Manifest(step, saved, files, arrays)._asdict())  # syncs `folder` as well


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> Manifest:
  """Compares the files of a checkpoint with its manifest, and returns the manifest.

  Args:
    folder: the step directory.
    share: (process index, number of processes): the process checks every `share[1]`-th file.
  Raises:
    Damaged: the save did not finish, or a file is missing or differs; the message names one file.
  """
  manifest, (process, processes) = read(folder), share
  with ThreadPoolExecutor(READERS) as pool:
    names = list(manifest.files)[process::processes]
    differences = pool.map(lambda name: _difference(folder / name, *manifest.files[name]), names)
    wrong = [difference for difference in differences if difference]
  if wrong:
    raise Damaged(wrong[0].removeprefix(f"{folder}/") + (f", and {len(wrong) - 1} more files" if wrong[1:] else ""))
  return manifest


def read(folder: Path) -> Manifest:
  """Reads the manifest of a checkpoint without checking its files; raises `Damaged`."""
  try:
    contents = read_checksummed_json(folder / NAME)
    manifest = contents and Manifest(**contents)
  except (UserError, TypeError):
    raise Damaged(f"{NAME} is not what was written") from None
  if manifest is None:
    raise Damaged(f"it has no {NAME}: the save did not finish, or the code that saved it wrote no manifests")
  if str(manifest.step) != folder.name:
    raise Damaged(f"{NAME} is that of step {manifest.step}")
  if outside := [name for name in manifest.files if not name.startswith(f"{COVERED}/") or ".." in name.split("/")]:
    raise Damaged(f"{NAME} names files outside of {COVERED}/, such as {outside[0]}")
  return manifest


def directories(checkpoints: Path) -> dict[int, Path]:
  """{step: its directory}, complete or not, in the order of steps."""
  named = [path for path in checkpoints.glob("*") if re.fullmatch(r"0|[1-9]\d*", path.name)]
  return {int(path.name): path for path in sorted(named, key=lambda path: int(path.name))}


def finished(checkpoints: Path) -> list[int]:
  """The steps of the directories that have a manifest, in ascending order."""
  return [step for step, folder in directories(checkpoints).items() if (folder / NAME).exists()]


def _sync_and_hash(path: Path) -> tuple[int, str] | None:
  """(bytes, XXH3) of a file; None for a directory."""
  if path.is_dir():
    return sync_directory(path)
  with path.open("rb") as file:
    os.fsync(file.fileno())  # tensorstore syncs its own files; orbax does not sync those that it adds
  return path.stat().st_size, _file_xxh3(path)


def _file_xxh3(path: Path) -> str:
  digest, chunk = xxhash.xxh3_64(), memoryview(bytearray(CHUNK))
  with path.open("rb", buffering=0) as file:
    while count := file.readinto(chunk):
      digest.update(chunk[:count])
  return digest.hexdigest()


def _difference(path: Path, size: int, checksum: str) -> str | None:
  """How a file differs from its entry in the manifest; None if it does not."""
  for tries_left in reversed(range(TRIES)):
    try:
      if (found := path.stat().st_size) != size:
        return f"{path} has {found:,} bytes of {size:,}"
      return None if _file_xxh3(path) == checksum else f"{path} is not what was written"
    except OSError as error:
      if not tries_left or isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return f"{path}: {error.strerror}"
      time.sleep(PAUSE)
