"""Text corpora: local files, or a dataset of the Hugging Face hub. Both are read with `datasets`.

A corpus is a sequence of parts: local files or shards of the hub. Each part is a re-iterable of documents (strings), so
that an interrupted reader resumes in the part where it stopped.
"""

import errno
import glob
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from switchlora_jax.errors import UserError

HUB = "hub:"  # prefix of the name of a hub dataset
C4 = "hub:allenai/c4:en"  # the paper's corpus
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # second suffixes that `datasets` decompresses
DECOMPRESSORS = {".zst": "zstandard", ".lz4": "lz4"}  # suffixes that need an optional package
FIELD = "text"  # JSON key or Parquet column that holds the document
READ_BATCH = 32  # lines or Parquet rows per read


class Corpus(NamedTuple):
  """Training and validation text.

  Attributes:
    train: parts with the training documents.
    valid: parts with the validation documents, or None if the last training sequences are held out instead.
    notes: further entries of `Dataset.summary`, such as `overlap`.
  """

  train: Sequence[Iterable[str]]
  valid: Sequence[Iterable[str]] | None
  notes: Mapping[str, Any] = MappingProxyType({})


def open_corpus(path: str, eval_path: str, flags: tuple[str, str]) -> Corpus:
  """Finds the documents that `path` and `eval_path` name. No file is opened yet.

  File formats, by suffix: `.json`, `.jsonl` or `.ndjson` has one JSON object per line with a string `text`; `.parquet`
  has a column `text` of strings; any other file is one document. A second suffix `.gz`, `.bz2`, `.xz`, `.zst` or `.lz4`
  marks a compressed file.

  Args:
    path: a glob of files, or `hub:NAME` or `hub:NAME:SUBSET`, whose splits `train` and `validation` are used.
    eval_path: a glob of validation files, or empty. Must be empty for a hub dataset.
    flags: the names of the two arguments on the command line, for error messages.

  Raises:
    UserError: a glob matches no file, a file is in both globs, or the hub dataset cannot be opened.
  """
  if path.startswith(HUB):
    return _hub(path, eval_path, flags)
  train = matching_files(path, flags[0])
  if not eval_path:
    return Corpus(tuple(map(LocalFile, train)), None)
  valid = matching_files(eval_path, flags[1])
  seen = set(map(os.path.realpath, train))  # resolves links and `..`
  if shared := [file for file in valid if os.path.realpath(file) in seen]:
    raise UserError(
      f"training and validation must not share files; {flags[0]} and {flags[1]} both match {shared[0]} "
      f"(shared files: {len(shared)}); narrow one of the globs"
    )
  return Corpus(tuple(map(LocalFile, train)), tuple(map(LocalFile, valid)))


def matching_files(pattern: str, flag: str) -> tuple[str, ...]:
  """The files that a glob matches, sorted.

  Raises:
    UserError: there are none. The message names `flag`.
  """
  if not pattern:
    raise UserError(f"{flag} must be a glob of text files; it is empty; pass e.g. {flag}='c4/*.json.gz'")
  found = glob.glob(os.path.expanduser(pattern), recursive=True)
  files = tuple(sorted({file for file in found if os.path.isfile(file)}))  # `**/**` matches some files twice
  if not files:
    raise UserError(
      f"{flag} (={pattern!r}) must match text, JSON lines or Parquet files; it matches no file; "
      f"check it with ls, and quote it in the shell: {flag}='c4/*.json.gz'"
    )
  return files


# Local files.


@dataclass(frozen=True)
class LocalFile:
  """The documents of one file. At most `READ_BATCH` lines or rows are in memory at a time."""

  path: str

  def origin(self) -> list:
    """[absolute path, size in bytes, modification time in ns], to detect that the file has changed."""
    status = os.stat(self.path)
    return [os.path.abspath(self.path), status.st_size, status.st_mtime_ns]

  def __iter__(self) -> Iterator[str]:
    match _format(self.path):
      case ".json" | ".jsonl" | ".ndjson":
        yield from (_field(line, self.path, n) for n, line in enumerate(_lines(self.path), 1) if line.strip())
      case ".parquet":
        yield from _column(self.path)
      case _:
        yield "".join(_lines(self.path))


def _format(path: str) -> str:
  """The suffix that determines the file format, without that of a compression."""
  stem, suffix = os.path.splitext(path.lower())
  return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def _lines(path: str) -> Iterator[str]:
  """The lines of a text file, each with its line break."""
  return _rows(path, "UTF-8 text (compressed as its suffix says)", "from_text", keep_linebreaks=True)


def _column(path: str) -> Iterator[str]:
  """The documents of a Parquet file."""
  what = f"a Parquet file with a column `{FIELD}` of strings"
  for text in _rows(path, what, "from_parquet", columns=[FIELD]):
    if not isinstance(text, str):
      raise UserError(f"{path} must be {what}; found {text!r:.60}; leave such rows out, or the file out of the glob")
    yield text


def _rows(path: str, what: str, reader: str, **options: Any) -> Iterator[Any]:
  """The field `text` of every row that a reader of `datasets.IterableDataset` finds in a file.

  Args:
    path: the file.
    what: the expected content, for error messages.
    reader: `from_text` or `from_parquet`.
    **options: passed to the reader.
  """
  import datasets  # local import: it takes a second, and the embedded text does not need it

  try:
    with tempfile.TemporaryDirectory() as scratch:  # for a lock file; nothing else is cached
      # Not load_dataset, which reports its use over the network.
      rows = getattr(datasets.IterableDataset, reader)(glob.escape(path), cache_dir=scratch, **options)
    for batch in rows.iter(batch_size=READ_BATCH):
      yield from batch[FIELD]
  except Exception as error:  # each compression format raises its own errors
    if isinstance(error, OSError) and error.errno == errno.EIO:
      raise UserError(f"{path} could not be read ({error.strerror}); check the disk or the network drive") from error
    package = DECOMPRESSORS.get(os.path.splitext(path.lower())[1])
    install = f"pip install {package} if it is missing, or " if package else ""
    raise UserError(
      f"{path} must be {what}; reading it failed with {_one_line(error)}; "
      f"{install}convert or rename it, or leave it out of the glob"
    ) from error


def _one_line(error: Exception) -> str:
  """Type and message of a library's error, on one line."""
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _field(line: str, path: str, number: int) -> str:
  """The field `text` of a JSON line."""
  try:
    row = json.loads(line)
    if isinstance(row, dict) and isinstance(row.get(FIELD), str):
      row[FIELD].encode()  # raises for a lone surrogate such as \ud800, which cannot be tokenized
      return row[FIELD]
    found = f"the fields {sorted(row)}" if isinstance(row, dict) and FIELD not in row else line.strip()[:60]
  except (ValueError, RecursionError) as error:
    found = f"invalid JSON ({error})"
  raise UserError(
    f'{path}, line {number}: expected a JSON object with a `text` string, as {{"text": "…"}}; found {found}; '
    "write one such object per line, or name plain text .txt"
  )


# The hub.


@dataclass(frozen=True)
class HubShard:
  """The documents of one shard of a hub dataset, streamed."""

  split: Any  # datasets.IterableDataset
  index: int
  name: str

  def origin(self) -> list:
    """[name, shard index, number of shards], to detect that the dataset has changed."""
    return [self.name, self.index, self.split.num_shards]

  def __iter__(self) -> Iterator[str]:
    for row in self._rows():
      if not isinstance(row.get(FIELD), str):
        raise UserError(
          f"{self.name} must have a field `{FIELD}` of strings; found {sorted(row)}; choose another dataset"
        )
      yield row[FIELD]

  def _rows(self) -> Iterator[dict]:
    try:
      yield from self.split.shard(self.split.num_shards, self.index)
    except Exception as error:  # network errors, and errors of every file format
      raise UserError(
        f"{self.name}, shard {self.index}: reading failed with {_one_line(error)}; the same command continues from here"
      ) from error


def _hub(path: str, eval_path: str, flags: tuple[str, str]) -> Corpus:
  """The splits `train` and, if it exists, `validation` of `hub:NAME[:SUBSET]`."""
  import datasets

  name, _, subset = path.removeprefix(HUB).partition(":")
  if eval_path:
    raise UserError(
      f"{flags[1]} (={eval_path!r}) is not used with {path}, which has its own validation split; leave it out"
    )
  try:
    splits = datasets.load_dataset(name, subset or None, streaming=True)
  except Exception as error:
    raise UserError(
      f"{path} could not be opened: {_one_line(error)}; it needs network access and the name of a dataset, as in {C4}; "
      f"for a local copy, pass its files: {flags[0]}='c4/en/*.json.gz'"
    ) from error
  if "train" not in splits:
    raise UserError(f"{path} must have a split `train`; it has {', '.join(splits)}; choose another dataset")
  shards = lambda split: tuple(HubShard(splits[split], i, f"{path}, {split}") for i in range(splits[split].num_shards))
  return Corpus(shards("train"), shards("validation") if "validation" in splits else None)
