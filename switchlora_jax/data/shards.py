"""Packed sequences on disk: a folder of memory-mapped shards, and the manifest that describes them.

Shards are `.npy` files of [rows, seq_len], a row being one sequence. All shards of a split but the last have the same
number of rows. The manifest is written last: a folder without a manifest is incomplete.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from switchlora_jax.data.tokenizer import tokenizer_sha256
from switchlora_jax.errors import UserError
from switchlora_jax.progress import progress_bar
from switchlora_jax.runs.files import file_sha256, read_checksummed_json, write_bytes
from switchlora_jax.runs.tokenizer_files import tokenizer_in

MANIFEST = "manifest.json"
PACKINGS = ("pack", "pad")  # documents are joined and cut into sequences, or each is one sequence, see `packing`
PAD = -1  # id of padding; 65,535 in shards of uint16


class PackedSequences:
  """The sequences `start` to `stop` of the shards of a split, [stop − start, seq_len]. Tokens are read on indexing.

  An array of indices returns the tokens of these sequences, an integer those of one sequence. A slice with step 1
  returns another `PackedSequences` without reading anything. Padding is `PAD`, if sequences are padded.
  """

  def __init__(
    self,
    shards: list[np.ndarray],
    start: int,
    stop: int,
    files: "list[MappedFile] | None" = None,
    padded: bool = False,
  ):
    self._shards, self._start, self._stop, self._files, self._padded = shards, start, stop, files, padded
    self._rows_per_shard = len(shards[0]) if shards else 1  # the last shard may have fewer

  def __len__(self) -> int:
    return self._stop - self._start

  @property
  def dtype(self) -> np.dtype:
    """uint16 if the vocabulary fits and sequences are not padded, else int32."""
    return np.dtype(np.int32) if self._padded else self._shards[0].dtype

  @property
  def shape(self) -> tuple[int, int]:
    """(number of sequences, seq_len)."""
    return len(self), self._shards[0].shape[1]

  def __getitem__(self, index):
    if isinstance(index, slice):
      start, stop, step = index.indices(len(self))
      if step != 1:
        raise IndexError(f"slices must have step 1; found a step of {step}")
      bounds = self._start + start, self._start + max(start, stop)
      return PackedSequences(self._shards, *bounds, self._files, self._padded)
    index = np.asarray(index)
    if ((index < -len(self)) | (index >= len(self))).any():
      raise IndexError(f"sequence {index} of {len(self)}")
    shards, rows = np.divmod(self._start + index % len(self), self._rows_per_shard)
    if index.ndim == 0:
      return self._with_padding(np.asarray(self._shard(shards)[rows]))
    tokens = np.empty((len(index), self.shape[1]), self.dtype)
    for shard in np.unique(shards):
      here = shards == shard
      tokens[here] = self._with_padding(self._shard(shard)[rows[here]])
    return tokens

  def _with_padding(self, stored: np.ndarray) -> np.ndarray:
    """The tokens of stored sequences: int32 with `PAD` if they are padded, else unchanged."""
    if not self._padded:
      return stored
    return np.where(stored == np.array(PAD).astype(stored.dtype), PAD, stored.astype(np.int32))

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(self[np.arange(len(self))], dtype)

  def _shard(self, index: int) -> np.ndarray:
    """A shard, after checking the length of its file. Reading a map beyond the end of its file is a SIGBUS."""
    if self._files:
      self._files[index].check_uncut()
    return self._shards[index]


class MappedFile(NamedTuple):
  """The file of a memory-mapped shard, and its size in bytes when it was mapped."""

  path: Path
  size: int

  def check_uncut(self) -> None:
    """Raises `UserError` if the file is shorter now. A removed file can still be read through its map."""
    with contextlib.suppress(FileNotFoundError):
      if (found := os.stat(self.path).st_size) < self.size:
        raise UserError(
          f"{self.path} must have {self.size:,} bytes; it was cut to {found:,} during the run; restore it, or delete "
          "its folder and prepare it again; the same command continues from the last checkpoint"
        )


class Shard(NamedTuple):
  """A shard as listed in the manifest: file name, number of sequences, and SHA-256 of the file."""

  file: str
  rows: int
  sha256: str


def write_shard(path: Path, rows: np.ndarray) -> Shard:
  """Writes [rows, seq_len] as an `.npy` file, atomically and synced to disk."""
  npy = io.BytesIO()
  np.save(npy, rows)
  write_bytes(path, npy.getbuffer())
  return Shard(path.name, len(rows), hashlib.sha256(npy.getbuffer()).hexdigest())


def read_manifest(folder: Path) -> dict | None:
  """The manifest of a finished folder, or None if the folder is not finished."""
  return read_checksummed_json(folder / MANIFEST)


def fingerprint(manifest: dict) -> str:
  """Hash of the tokenizer and of the sequences, 16 hexadecimal digits. Paths and source files do not enter."""
  splits = [[shard[1:] for shard in manifest[name]["shards"]] for name in ("train", "valid") if manifest[name]]
  contents = [manifest["tokenizer"], splits, *(["pad"] if packing_of(manifest) == "pad" else [])]
  return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def packing_of(manifest: dict) -> str:
  """How the sequences of a folder were made, one of `PACKINGS`; folders that do not record it were packed."""
  return manifest.get("request", {}).get("packing", PACKINGS[0])


def open_sequences(folder: Path, split: dict) -> PackedSequences:
  """The sequences of a split. `split` is its entry in the manifest, which has `padding` if they are padded."""
  paths = [folder.resolve() / file for file, _, _ in split["shards"]]
  shards = [_map_shard(path) for path in paths]
  files = [MappedFile(path, path.stat().st_size) for path in paths]
  return PackedSequences(shards, 0, split["rows"], files, padded="padding" in split)


def _map_shard(path: Path) -> np.ndarray:
  """Maps a shard into memory. A map of Arrow, unlike one of NumPy, holds no file descriptor."""
  import pyarrow  # local import: planning and evaluation of in-memory arrays do not need it

  found = np.load(path, mmap_mode="r")
  with pyarrow.memory_map(os.fspath(path)) as file:
    contents = file.read_buffer()
  return np.frombuffer(contents, found.dtype, found.size, found.offset).reshape(found.shape)


def verify_checksums(folder: Path, manifest: dict, progress: bool, share: tuple[int, int] = (0, 1)) -> None:
  """Compares the tokenizer and every shard with their checksums in the manifest.

  Args:
    folder: the prepared folder.
    manifest: its manifest.
    progress: whether to show a progress bar.
    share: (process index, number of processes). Each process checks its share of the files.

  Raises:
    UserError: a file is missing or differs. The message names it.
  """
  files = [(tokenizer_in(folder), manifest["tokenizer"], tokenizer_sha256)]
  splits = [manifest[name] for name in ("train", "valid") if manifest[name]]
  files += [(folder / file, sha256, file_sha256) for split in splits for file, _, sha256 in split["shards"]]
  process, processes = share
  files = files[process::processes]
  with ThreadPoolExecutor() as pool:
    checks = pool.map(lambda file: _verify_checksum(*file), files)
    list(progress_bar(checks, desc="verify data", total=len(files), unit="file", shown=progress, delay=1))


def _verify_checksum(path: Path, sha256: str, hash_of: Callable[[Path], str]):
  try:
    found = hash_of(path)
  except OSError as error:
    found = error.strerror
  if found != sha256:
    raise UserError(f"{path} must have the SHA-256 {sha256}; found {found}; restore it, or prepare the data again")
