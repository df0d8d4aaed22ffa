"""The user's documents: local files, or a dataset of the Hugging Face hub, both read through `datasets`.

A corpus is read in parts, which are files or the hub's shards. Each is an iterable of documents (strings) that can be
iterated again and again, so that a reader that was stopped goes on in the part where it was.
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

HUB = "hub:"  # before the name of a dataset of the hub
C4 = "hub:allenai/c4:en"  # the corpus of the paper
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # further endings of a file, which `datasets` unpacks
UNPACKERS = {".zst": "zstandard", ".lz4": "lz4"}  # the packages that it wants for some of them
FIELD = "text"
AHEAD = 32  # lines, or rows of a column, that are read at once


class Corpus(NamedTuple):
  """The parts to train and to validate on, or None where the text names none; and what else is to be said of it."""

  train: Sequence[Iterable[str]]
  valid: Sequence[Iterable[str]] | None
  notes: Mapping[str, Any] = MappingProxyType({})


def open_corpus(path: str, eval_path: str, flags: tuple[str, str]) -> Corpus:
  """The documents that `path` and `eval_path` name: globs of files, or `hub:NAME` or `hub:NAME:SUBSET` for both.

  A `.json` or `.jsonl` file holds a JSON object a line, whose `text` is a document, a `.parquet` file a column `text`;
  any other file is one document. A further `.gz`, `.bz2`, `.xz`, `.zst` or `.lz4` means that the file is compressed
  (Parquet compresses inside). No file is opened yet.

  Args:
    flags: what a user calls the two, for messages.
  Raises:
    UserError: nothing is there, or validation has a file of training.
  """
  if path.startswith(HUB):
    return _hub(path, eval_path, flags)
  train = files_of(path, flags[0])
  if not eval_path:
    return Corpus(tuple(map(File, train)), None)
  valid = files_of(eval_path, flags[1])
  seen = set(map(os.path.realpath, train))  # the same file may go by another name
  if shared := [file for file in valid if os.path.realpath(file) in seen]:
    raise UserError(
      f"validation text must be text that training does not see; {flags[0]} and {flags[1]} "
      f"both match {shared[0]} ({len(shared)} such); narrow one of them"
    )
  return Corpus(tuple(map(File, train)), tuple(map(File, valid)))


def files_of(pattern: str, flag: str) -> tuple[str, ...]:
  """The files that a glob matches, sorted; a UserError where there are none."""
  if not pattern:
    raise UserError(f"text needs files; {flag} is empty; pass e.g. {flag}='c4/*.json.gz'")
  found = glob.glob(os.path.expanduser(pattern), recursive=True)
  files = tuple(sorted({file for file in found if os.path.isfile(file)}))  # `**/**` finds some twice
  if not files:
    raise UserError(
      f"{flag} (={pattern!r}) must match text, JSON lines or Parquet files; it matches no file; "
      f"check it with ls, and quote it: {flag}='c4/*.json.gz'"
    )
  return files


# Local files.


@dataclass(frozen=True)
class File:
  """The documents of a file; in memory are `AHEAD` of them, if they are lines, and a chunk of the file."""

  path: str

  def origin(self) -> list:
    """What changes when the file may have changed, as JSON."""
    status = os.stat(self.path)
    return [os.path.abspath(self.path), status.st_size, status.st_mtime_ns]

  def __iter__(self) -> Iterator[str]:
    match _kind(self.path):
      case ".json" | ".jsonl" | ".ndjson":
        yield from (_field(line, self.path, n) for n, line in enumerate(_lines(self.path), 1) if line.strip())
      case ".parquet":
        yield from _column(self.path)
      case _:
        yield "".join(_lines(self.path))


def _kind(path: str) -> str:
  stem, ending = os.path.splitext(path.lower())
  return os.path.splitext(stem)[1] if ending in COMPRESSED else ending


def _lines(path: str) -> Iterator[str]:
  """The lines of a text file, with their line breaks."""
  return _rows(path, "UTF-8 text (compressed as its ending says)", "from_text", keep_linebreaks=True)


def _column(path: str) -> Iterator[str]:
  """The documents of a Parquet file."""
  what = f"a Parquet file with a column `{FIELD}` of strings"
  for text in _rows(path, what, "from_parquet", columns=[FIELD]):
    if not isinstance(text, str):
      raise UserError(f"{path} must be {what}; found {text!r:.60}; leave such rows out, or the file out of the glob")
    yield text


def _rows(path: str, what: str, reader: str, **options: Any) -> Iterator[Any]:
  """The field `text` of what a reader of `datasets` finds in a file."""
  import datasets  # here, because it takes a second and only the user's own text wants it

  try:
    with tempfile.TemporaryDirectory() as scratch:  # for a lock file; streaming keeps no data
      # Not load_dataset, which reports each use over the network.
      rows = getattr(datasets.IterableDataset, reader)(glob.escape(path), cache_dir=scratch, **options)
    for batch in rows.iter(batch_size=AHEAD):
      yield from batch[FIELD]
  except Exception as error:  # every way of compressing has errors of its own
    if isinstance(error, OSError) and error.errno == errno.EIO:
      raise UserError(f"{path} could not be read ({error.strerror}); see the disk or the network drive") from error
    unpacker = UNPACKERS.get(os.path.splitext(path.lower())[1])
    install = f"pip install {unpacker} if it is missing, or " if unpacker else ""
    raise UserError(
      f"{path} must be {what}; reading it failed with {_named(error)}; "
      f"{install}convert or rename it, or leave it out of the glob"
    ) from error


def _named(error: Exception) -> str:
  """An error of a library in a line."""
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _field(line: str, path: str, number: int) -> str:
  try:
    row = json.loads(line)
    if isinstance(row, dict) and isinstance(row.get(FIELD), str):
      row[FIELD].encode()  # an escape such as \ud800 is half a character, which no tokenizer takes
      return row[FIELD]
    found = f"the fields {sorted(row)}" if isinstance(row, dict) and FIELD not in row else line.strip()[:60]
  except (ValueError, RecursionError) as error:
    found = f"no JSON ({error})"
  raise UserError(
    f'{path}, line {number}: expected a JSON object with a `text` string, as {{"text": "…"}}; found {found}; '
    "write one such object a line, or name plain text .txt"
  )


# The hub.


@dataclass(frozen=True)
class HubShard:
  """The documents of one shard of a split of the hub, streamed."""

  split: Any  # datasets.IterableDataset
  index: int
  name: str

  def origin(self) -> list:
    """Which of how many shards, as JSON."""
    return [self.name, self.index, self.split.num_shards]

  def __iter__(self) -> Iterator[str]:
    for row in self._rows():
      if not isinstance(row.get(FIELD), str):
        raise UserError(f"{self.name} must have a field `{FIELD}` of strings; found {sorted(row)}; name another")
      yield row[FIELD]

  def _rows(self) -> Iterator[dict]:
    try:
      yield from self.split.shard(self.split.num_shards, self.index)
    except Exception as error:  # of the network, of files of any kind
      raise UserError(
        f"{self.name}, shard {self.index}: reading failed with {_named(error)}; the same command goes on from here"
      ) from error


def _hub(path: str, eval_path: str, flags: tuple[str, str]) -> Corpus:
  """The splits `train` and, where there is one, `validation` of `hub:NAME[:SUBSET]`."""
  import datasets

  name, _, subset = path.removeprefix(HUB).partition(":")
  if eval_path:
    raise UserError(f"{flags[1]} (={eval_path!r}) is not read beside {path}, whose own split validates; leave it out")
  try:
    splits = datasets.load_dataset(name, subset or None, streaming=True)
  except Exception as error:
    raise UserError(
      f"{path} could not be opened: {_named(error)}; it wants a network and the name of a dataset, as in {C4}; of a "
      f"local copy, give the files: {flags[0]}='c4/en/*.json.gz'"
    ) from error
  if "train" not in splits:
    raise UserError(f"{path} must have a split `train`; it has {', '.join(splits)}; name another dataset")
  shards = lambda split: tuple(HubShard(splits[split], i, f"{path}, {split}") for i in range(splits[split].num_shards))
  return Corpus(shards("train"), shards("validation") if "validation" in splits else None)
