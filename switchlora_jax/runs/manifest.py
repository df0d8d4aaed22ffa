"""What a finished checkpoint says of itself: the size and checksum of every file, and a checksum of every array.

`manifest.json` is written last, into the directory of its step while that still has a temporary name: whatever has the
name of a step and no manifest is no checkpoint. It lies with the files it speaks of, so that the two are copied,
moved and removed together. It covers `state/`, all that is ever read; what orbax writes beside it after the manifest
(`_CHECKPOINT_METADATA`, `commit_success.txt`) is not.

Nothing here needs a device. The checksum of a file is XXH3: as fast as the file is read, which CRC-32 is not.
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
from switchlora_jax.runs.files import read_json, write_json

NAME = "manifest.json"
COVERED = "state"
CHUNK = 1 << 18  # bytes read at a time: they stay in the cache of a core until they are summed
TRIES, PAUSE = 3, 1.0  # of a file that cannot be read just now, as on network drives; seconds between them
READERS = 4  # threads; the files of a small state are read sooner than more of them are started


class Damaged(ValueError):
  """A directory with the name of a step is not what was saved; says how."""


class Manifest(NamedTuple):
  """What a checkpoint says of itself.

  Attributes:
    step: the state is that before it. saved: when, ISO 8601 in UTC.
    files: {path within the directory of the step: [bytes, XXH3 in hexadecimal]}.
    arrays: {path of the leaf: [checksum, *shape]}, as from `checksums.named_checksums`.
  """

  step: int
  saved: str
  files: dict[str, list]
  arrays: dict[str, list[int]]

  @property
  def size(self) -> int:
    """Bytes of all files."""
    return sum(size for size, _ in self.files.values())


def write(folder: Path, step: int, arrays: dict[str, list[int]]) -> None:
  """Finish the checkpoint in `folder`: bring all of it to the disk, the manifest last."""
  paths = [folder / COVERED, *sorted((folder / COVERED).rglob("*"))]
  with ThreadPoolExecutor(READERS) as pool:
    found = pool.map(_sync_and_measure, paths)
    files = {str(path.relative_to(folder)): of for path, of in zip(paths, found, strict=True) if of}
  saved = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  write_json(folder / NAME, Manifest(step, saved, files, arrays)._asdict())
  sync(folder)


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> Manifest:
  """Compare the files of a checkpoint with its manifest, which is returned.

  Args:
    share: (number of a process, of how many), which looks at its share of the files.
  Raises:
    Damaged: the save did not end, or a file is missing or not what was written; names one.
  """
  manifest, (process, processes) = read(folder), share
  with ThreadPoolExecutor(READERS) as pool:
    names = list(manifest.files)[process::processes]
    wrong = [found for found in pool.map(lambda name: _wrong(folder / name, *manifest.files[name]), names) if found]
  if wrong:
    raise Damaged(wrong[0].removeprefix(f"{folder}/") + (f", and {len(wrong) - 1} more files" if wrong[1:] else ""))
  return manifest


def read(folder: Path) -> Manifest:
  """The manifest of a checkpoint, without a look at its files; raises `Damaged`."""
  try:
    found = read_json(folder / NAME)
    manifest = found and Manifest(**found)
  except (UserError, TypeError):
    raise Damaged(f"{NAME} is not what was written") from None
  if manifest is None:
    raise Damaged(f"it has no {NAME}: the save did not end, or was made by code that wrote none")
  if str(manifest.step) != folder.name:
    raise Damaged(f"{NAME} is that of step {manifest.step}")
  if elsewhere := [name for name in manifest.files if not name.startswith(f"{COVERED}/") or ".." in name.split("/")]:
    raise Damaged(f"{NAME} names files outside of {COVERED}/, such as {elsewhere[0]}")
  return manifest


def directories(checkpoints: Path) -> dict[int, Path]:
  """{step: its directory}, finished or not, oldest first."""
  named = [path for path in checkpoints.glob("*") if re.fullmatch(r"0|[1-9]\d*", path.name)]
  return {int(path.name): path for path in sorted(named, key=lambda path: int(path.name))}


def finished(checkpoints: Path) -> list[int]:
  """The steps that have a manifest, oldest first."""
  return [step for step, folder in directories(checkpoints).items() if (folder / NAME).exists()]


def sync(directory: Path) -> None:
  """Bring the names in a directory to the disk."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _sync_and_measure(path: Path) -> tuple[int, str] | None:
  if path.is_dir():
    return sync(path)
  with path.open("rb") as file:
    os.fsync(file.fileno())  # tensorstore has done so for its own; orbax not for what it writes around them
  return path.stat().st_size, _checksum(path)


def _checksum(path: Path) -> str:
  digest, chunk = xxhash.xxh3_64(), memoryview(bytearray(CHUNK))
  with path.open("rb", buffering=0) as file:
    while count := file.readinto(chunk):
      digest.update(chunk[:count])
  return digest.hexdigest()


def _wrong(path: Path, size: int, checksum: str) -> str | None:
  """What is wrong with a file, or None."""
  for left in reversed(range(TRIES)):
    try:
      if (found := path.stat().st_size) != size:
        return f"{path} has {found:,} bytes of {size:,}"
      return None if _checksum(path) == checksum else f"{path} is not what was written"
    except OSError as error:
      if not left or isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return f"{path}: {error.strerror}"
      time.sleep(PAUSE)
