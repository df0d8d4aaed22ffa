"""Text corpora: local files (see `readers`), or a dataset of the Hugging Face hub, which is read with `datasets`.

A corpus is a sequence of parts: local files or shards of the hub. Each part is a re-iterable of documents, so that an
interrupted reader resumes in the part where it stopped.
"""

import glob
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import fsspec.compression

from switchlora_jax.data import readers
from switchlora_jax.data.readers import DEFAULT_ROWS, BadRow, Document, RowOptions
from switchlora_jax.errors import UserError, one_line

HUB = "hub:"  # prefix of the name of a hub dataset
C4 = "hub:allenai/c4:en"  # the paper's corpus


class Corpus(NamedTuple):
  """Training and validation text.

  Attributes:
    train: parts with the training documents.
    valid: parts with the validation documents, or None if the last training sequences are held out instead.
    notes: further entries of `Dataset.summary`, such as `overlap`.
  """

  train: Sequence[Iterable[Document | BadRow]]
  valid: Sequence[Iterable[Document | BadRow]] | None
  notes: Mapping[str, Any] = MappingProxyType({})


def open_corpus(path: str, eval_path: str, rows: RowOptions) -> Corpus:
  """Finds the documents that `path` and `eval_path` name. No file is opened yet.

  File formats, by suffix: `.json`, `.jsonl` or `.ndjson` has one JSON object per line with a string `text`; `.parquet`
  has a column `text` of strings; any other file is one document. A second suffix `.gz`, `.bz2`, `.xz`, `.zst` or `.lz4`
  marks a compressed file.

  Args:
    path: a glob of files, or `hub:NAME` or `hub:NAME:SUBSET`, whose splits `train` and `validation` are used.
    eval_path: a glob of validation files, or empty. Must be empty for a hub dataset.
    rows: another name than `text`, what to do with rows without text, and the names of the flags for error messages.

  Raises:
    UserError: a glob matches no file, a file is in both globs, or the hub dataset cannot be opened.
  """
  if path.startswith(HUB):
    return _hub(path, eval_path, rows)
  files = lambda names: tuple(LocalFile(name, rows) for name in names)
  flags = f"{rows.flags}path", f"{rows.flags}eval_path"
  train = matching_files(path, flags[0])
  if not eval_path:
    return Corpus(files(train), None)
  valid = matching_files(eval_path, flags[1])
  if shared := shared_files(train, valid):
    raise UserError(
      f"training and validation must not share files; {flags[0]} and {flags[1]} both match {shared[0]} "
      f"(shared files: {len(shared)}); narrow one of the globs"
    )
  return Corpus(files(train), files(valid))


def shared_files(one: Sequence[str], other: Sequence[str]) -> list[str]:
  """The files of `other` that are in `one` as well, also under another name."""
  seen = set(map(os.path.realpath, one))  # resolves links and `..`
  return [file for file in other if os.path.realpath(file) in seen]


def matching_files(pattern: str, flag: str) -> tuple[str, ...]:
  """The files that a glob matches, sorted. A pattern that is the name of a file is that file.

  Raises:
    UserError: there are none. The message names `flag`.
  """
  if not pattern:
    raise UserError(f"{flag} must be a glob of text files; it is empty; pass e.g. {flag}='c4/*.json.gz'")
  name = os.path.expanduser(pattern)
  found = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
  files = tuple(sorted({file for file in found if os.path.isfile(file)}))  # `**/**` matches some files twice
  if not files:
    fault = f"it matches no file; check it with ls, and quote it in the shell: {flag}='c4/*.json.gz'"
    folders = sorted(filter(os.path.isdir, found))
    fault = _folder_fault(name, folders, flag) if folders else fault
    raise UserError(f"{flag} (={pattern!r}) must match text, JSON lines or Parquet files; {fault}")
  return files


def _folder_fault(pattern: str, folders: list[str], flag: str) -> str:
  """What is wrong with a pattern that matches only folders, and which glob matches their files."""
  base = (glob.escape(pattern) if folders == [pattern] else pattern).rstrip("/")
  holds_files = lambda stars: any(map(os.path.isfile, glob.iglob(base + stars, recursive=True)))
  stars = "/**/*" if holds_files("/*/**/*") else "/*"
  if not holds_files(stars):
    return f"{folders[0]} is a folder without files"
  return f"{folders[0]} is a folder; pass its files, in quotes: {flag}={shlex.quote(base + stars)}"


# Local files.


@dataclass(frozen=True)
class LocalFile:
  """The documents of one file, see `readers.read_documents`. Some rows or pieces are in memory at a time."""

  path: str
  rows: RowOptions = DEFAULT_ROWS

  def origin(self) -> list:
    """[absolute path, size in bytes, modification time in ns], to detect that the file has changed."""
    status = os.stat(self.path)
    return [os.path.abspath(self.path), status.st_size, status.st_mtime_ns]

  def __iter__(self) -> Iterator[Document | BadRow]:
    return readers.read_documents(self.path, self.rows)


# The hub.


@dataclass(frozen=True)
class HubShard:
  """The documents of one shard of a hub dataset, streamed."""

  split: Any  # datasets.IterableDataset
  index: int
  name: str
  rows: RowOptions = DEFAULT_ROWS

  def origin(self) -> list:
    """[name, shard index, number of shards], to detect that the dataset has changed."""
    return [self.name, self.index, self.split.num_shards]

  def __iter__(self) -> Iterator[Document | BadRow]:
    return readers.raise_or_yield(self._documents(), self.rows)

  def _documents(self) -> Iterator[str | BadRow]:
    field = self.rows.field
    for number, row in enumerate(self._rows(), 1):
      if field not in row:
        remedy = self.rows.describe_field(name for name in sorted(row) if isinstance(row[name], str))
        raise UserError(
          f"{self.name} must have a field `{field}` of strings; found {sorted(row)}; {remedy}choose another dataset"
        )
      where, text = f"{self.name}, shard {self.index}, row {number}", row[field]
      if isinstance(text, str):
        yield readers.clean_text(text)
      else:
        yield BadRow(where, f"a string in the field `{field}`", f"{text!r:.60}", "choose another dataset", self.rows)

  def _rows(self) -> Iterator[dict]:
    try:
      yield from self.split.shard(self.split.num_shards, self.index)
    except Exception as error:  # network errors, and errors of every file format
      raise UserError(
        f"{self.name}, shard {self.index}: reading failed with {one_line(error)}; the same command continues from here"
      ) from error


def _hub(path: str, eval_path: str, rows: RowOptions) -> Corpus:
  """The splits `train` and, if it exists, `validation` of `hub:NAME[:SUBSET]`."""
  import datasets

  name, _, subset = path.removeprefix(HUB).partition(":")
  if eval_path:
    raise UserError(
      f"{rows.flags}eval_path (={eval_path!r}) is not used with {path}, which has its own validation split; leave it "
      "out"
    )
  _register_zstandard()
  try:
    splits = datasets.load_dataset(name, subset or None, streaming=True)
  except Exception as error:
    raise UserError(
      f"{path} could not be opened: {one_line(error)}; it needs network access and the name of a dataset, as "
      f"in {C4}; for a local copy, pass its files: {rows.flags}path='c4/en/*.json.gz'"
    ) from error
  if "train" not in splits:
    raise UserError(f"{path} must have a split `train`; it has {', '.join(splits)}; choose another dataset")
  count = lambda split: splits[split].num_shards
  shards = lambda split: tuple(HubShard(splits[split], i, f"{path}, {split}", rows) for i in range(count(split)))
  return Corpus(shards("train"), shards("validation") if "validation" in splits else None)


def _register_zstandard():
  """Makes fsspec, with which `datasets` opens files, read all frames of a .zst file.

  Its own reader loses all frames but the first.
  """
  opened = fsspec.compression.compr.get("zstd")
  if getattr(opened, "func", None) is not _open_zstandard:
    opener = partial(_open_zstandard, opened=opened)
    fsspec.compression.register_compression("zstd", opener, "zst", force=True)


def _open_zstandard(file, mode="rb", *, opened, **options):
  """A file that is read with `readers.decompressed`, or in another mode as by the function `opened` of fsspec."""
  return readers.decompressed(file, ".zst") if mode == "rb" else opened(file, mode=mode, **options)
