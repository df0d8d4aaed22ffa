"""Packed rows on disk: a folder of shards that are mapped into memory, and the manifest that says what they are.

The manifest is written last: a folder without one is not finished. Shards are `.npy` files of [rows, seq_len], all of a
split with the same number of rows but the last.
"""

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import file_sha256, read_checksummed_json, write_bytes

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"


class Rows:
  """Rows start … stop of the shards of a split, one after another: [stop − start, seq_len], read where it is indexed.

  An array of row numbers gives their tokens, a slice gives `Rows` of these, a number gives one row.
  """

  def __init__(self, shards: list[np.ndarray], start: int, stop: int):
    self._shards, self._start, self._stop = shards, start, stop
    self._each = len(shards[0]) if shards else 1  # rows in every shard but the last

  def __len__(self) -> int:
    return self._stop - self._start

  @property
  def dtype(self) -> np.dtype:
    """uint16 where the vocabulary fits, else int32."""
    return self._shards[0].dtype

  @property
  def shape(self) -> tuple[int, int]:
    """(rows, seq_len)."""
    return len(self), self._shards[0].shape[1]

  def __getitem__(self, which):
    if isinstance(which, slice):
      start, stop, step = which.indices(len(self))
      if step != 1:
        raise IndexError(f"rows are sliced one after another; found a step of {step}")
      return Rows(self._shards, self._start + start, self._start + max(start, stop))
    which = np.asarray(which)
    if ((which < -len(self)) | (which >= len(self))).any():
      raise IndexError(f"row {which} of {len(self)}")
    shards, places = np.divmod(self._start + which % len(self), self._each)
    if which.ndim == 0:
      return np.asarray(_whole(self._shards[shards])[places])
    found = np.empty((len(which), self.shape[1]), self.dtype)
    for shard in np.unique(shards):
      here = shards == shard
      found[here] = _whole(self._shards[shard])[places[here]]
    return found

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(self[np.arange(len(self))], dtype)


def _whole(shard: np.ndarray) -> np.ndarray:
  """The shard, if its file is still as long as when it was opened: to read beyond its end would kill the process."""
  if isinstance(shard, np.memmap) and shard.base.size() < shard.offset + shard.nbytes:
    raise UserError(
      f"{shard.filename} must have {shard.offset + shard.nbytes:,} bytes; it was cut to {shard.base.size():,} under "
      "the run; restore it, or delete its folder and prepare it again, and the same command continues from the last "
      "checkpoint"
    )
  return shard


class Shard(NamedTuple):
  """A file of rows, and what is in it."""

  file: str
  rows: int
  sha256: str


def write_shard(path: Path, rows: np.ndarray) -> Shard:
  """Write an `.npy` that is complete, and on the disk, as soon as it has its name."""
  npy = io.BytesIO()
  np.save(npy, rows)
  write_bytes(path, npy.getbuffer())
  return Shard(path.name, len(rows), hashlib.sha256(npy.getbuffer()).hexdigest())


def read_manifest(folder: Path) -> dict | None:
  """What a finished folder says of itself; None where it is not finished."""
  return read_checksummed_json(folder / MANIFEST)


def fingerprint(manifest: dict) -> str:
  """Of the tokenizer and the rows, 16 hexadecimal digits; where and from which files they were made does not count."""
  splits = [[shard[1:] for shard in manifest[name]["shards"]] for name in ("train", "valid") if manifest[name]]
  return hashlib.sha256(json.dumps([manifest["tokenizer"], splits]).encode()).hexdigest()[:16]


def open_rows(folder: Path, split: dict) -> Rows:
  """The rows of a split of the manifest."""
  shards = [np.load(folder / file, mmap_mode="r") for file, _, _ in split["shards"]]
  return Rows(shards, 0, split["rows"])


def verify(folder: Path, manifest: dict, progress: bool, share: tuple[int, int] = (0, 1)) -> None:
  """Compare the tokenizer and every shard with its checksum.

  Args:
    share: (number of a process, of how many), which looks at its share of the files.
  Raises:
    UserError: a file is missing or not what was written; names it.
  """
  files = [(TOKENIZER, manifest["tokenizer"])]
  files += [(shard[0], shard[2]) for name in ("train", "valid") if manifest[name] for shard in manifest[name]["shards"]]
  process, processes = share
  files = files[process::processes]
  with ThreadPoolExecutor() as pool:
    checks = pool.map(lambda file: _check(folder / file[0], file[1]), files)
    list(tqdm(checks, desc="verify data", total=len(files), unit="file", disable=not progress, delay=1))


def _check(path: Path, sha256: str):
  try:
    found = file_sha256(path)
  except OSError as error:
    found = error.strerror
  if found != sha256:
    raise UserError(f"{path} must have the SHA-256 {sha256}; found {found}; restore it, or prepare the data again")
