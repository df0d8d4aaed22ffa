"""Prepared folders: a corpus is tokenized and packed once, and can be interrupted and resumed at any time.

The resulting files are bitwise the same with and without interruptions. `progress.json` stores the progress after each
full shard. The manifest is written last.
"""

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from switchlora_jax.data import packing, tokenizer
from switchlora_jax.data.corpus import Corpus
from switchlora_jax.data.packing import EncodedGroup, Position, SplitProgress
from switchlora_jax.data.readers import BAD_ROWS, FIELD
from switchlora_jax.data.shards import MANIFEST, PACKINGS, read_manifest
from switchlora_jax.errors import UserError
from switchlora_jax.progress import progress_bar
from switchlora_jax.runs.files import (
  UNSUPPORTED,
  LockTaken,
  exclusive_lock,
  read_checksummed_json,
  write_checksummed_json,
)
from switchlora_jax.runs.tokenizer_files import FAST, SENTENCEPIECE, is_fast, keep_tokenizer, tokenizer_in

log = logging.getLogger(__name__)

# Version of the packed sequences, part of the name of a cache folder and of the progress of an unfinished one. Raise it
# when the same text would give other sequences: after a change of what is read from files (`readers`) or docstrings
# (`documentation`), of how a tokenizer is trained (`tokenizer`), or of how tokens are packed and stored (`packing`,
# `preparation`, `shards`). The digests in tests/data/test_format_version.py detect such changes.
FORMAT_VERSION = 2

PROGRESS = "progress.json"
SPLITS = ("train", "valid")
# Keys that requests have only if they differ from these values: earlier ones have none.
ADDED = {"field": FIELD, "packing": PACKINGS[0]}


class Request(NamedTuple):
  """Everything that determines the packed sequences.

  Attributes:
    text: origin of the text, JSON-serialisable. It differs if the text may have changed.
    tokenizer: path of a tokenizer, see `tokenizer.load_tokenizer`; or `train:SIZE` or `train_bytes:SIZE`, which train
      one of SIZE pieces on the text.
    seq_len: tokens per sequence.
    take: maximum number of training documents; None: all.
    field: JSON key or Parquet column of the documents.
    bad_rows: what is done with rows without text, see `readers.RowOptions`. Not part of `to_json`: it makes no
      difference to a text without such rows, and the splits of a folder count those that were skipped.
    packing: one of `shards.PACKINGS`.
  """

  text: list | dict
  tokenizer: str
  seq_len: int
  take: int | None = None
  field: str = FIELD
  bad_rows: str = BAD_ROWS[0]
  packing: str = PACKINGS[0]

  @property
  def size_to_train(self) -> int | None:
    """Number of pieces of the tokenizer to train; None if `tokenizer` is a path."""
    return tokenizer.size_to_train(self.tokenizer, "tokenizer")

  def to_json(self) -> dict:
    """The request as read back from JSON, with the checksum of the tokenizer in place of its path."""
    contents = self._asdict()
    if self.size_to_train is None:
      contents["tokenizer"] = tokenizer.tokenizer_sha256(Path(self.tokenizer))
    del contents["bad_rows"]
    contents = {key: value for key, value in contents.items() if key not in ADDED or value != ADDED[key]}
    return json.loads(json.dumps(contents))


def fill_folder(folder: Path, request: Request, read: Callable[[], Corpus], *, wait: bool, progress: bool) -> dict:
  """Fills `folder` with the packed sequences of a corpus, unless it is finished already.

  Args:
    folder: created if it does not exist.
    request: what the folder must hold.
    read: returns the corpus. Called only if the folder is not finished.
    wait: whether to wait for another process that fills the folder. Otherwise this is an error.
    progress: whether to show progress bars.

  Returns:
    The manifest.

  Raises:
    UserError: the folder holds other sequences, is being filled or cannot be written, or the text cannot be read.
  """
  try:
    if not _is_finished(folder):  # a finished folder may be read-only
      folder.mkdir(parents=True, exist_ok=True)
      with _folder_lock(folder, wait):
        if (manifest := read_manifest(folder)) is None:
          return _Preparation(folder, request, progress).run(read())
        (folder / PROGRESS).unlink(missing_ok=True)  # left by a process killed after it wrote the manifest
    manifest = read_manifest(folder)
    _check_request(folder, manifest["request"], request.to_json())
    _check_bad_rows(folder, [manifest[name] for name in SPLITS if manifest[name]], request)
    return manifest
  except OSError as error:
    raise UserError(
      f"{folder} must be a writable directory with room for the packed rows; {error}; make room, and the same command "
      "continues where it stopped, or choose another directory"
    ) from error


def _is_finished(folder: Path) -> bool:
  return os.access(folder / MANIFEST, os.R_OK) and not (folder / PROGRESS).exists()


@contextlib.contextmanager
def _folder_lock(folder: Path, wait: bool) -> Iterator[None]:
  """Holds the lock of the folder, so that one process at a time fills it."""
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(exclusive_lock(folder, wait=wait))
    except LockTaken as holder:
      raise UserError(
        f"another process is filling {folder}; wait until it has finished, or choose another directory ({holder})"
      ) from None
    except OSError as error:
      if error.errno not in UNSUPPORTED:
        raise
      log.warning("%s cannot be locked (%s); make sure that no other process fills it", folder, error.strerror)
    yield


def _check_request(folder: Path, found: dict, expected: dict):
  """Raises `UserError` if the folder was filled or started for another request."""
  found, expected = ADDED | found, ADDED | expected
  keys = sorted(key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key))
  if keys:
    changed = "; ".join(f"{key} was {found.get(key)!r:.80} and is {expected.get(key)!r:.80}" for key in keys)
    raise UserError(f"{folder} was started for other rows ({changed}); choose a new directory, or delete this one")


def _check_bad_rows(folder: Path, splits: list[dict], request: Request):
  """Raises `UserError` if rows without text were skipped in a folder, but are an error of this request."""
  skipped = sum(split.get("bad_rows", 0) for split in splits)
  if skipped and request.bad_rows == "stop":
    raise UserError(
      f"{folder} was filled with bad_rows=skip, which left out rows without text (found {skipped:,}); set bad_rows to "
      "skip (--config.data.bad_rows, in prepare_data --bad_rows) to use it, or mend the text"
    )


def _code_versions(request: Request) -> dict:
  """The versions that determine the sequences beside the request."""
  return {"format": FORMAT_VERSION} | dict([tokenizer.library_version(request.tokenizer)])


def _check_code_versions(folder: Path, saved: dict, now: dict):
  """Raises `UserError` if the folder was started by versions that may give other sequences.

  Versions before this check recorded none. Such a folder is continued: it may hold days of work, and most likely the
  versions are the same.
  """
  then = {key: saved.get(key, value) for key, value in now.items()}
  if then != now:
    shown = {"sentencepiece": "SentencePiece"}
    named = lambda versions: " and ".join(f"{shown.get(name, name)} {version}" for name, version in versions.items())
    raise UserError(
      f"{folder} was started with {named(then)} and would be continued with {named(now)}, which may give other rows; "
      f"install the versions that it was started with, or delete {folder} and prepare it again"
    )


class _Preparation:
  """Fills one folder: the request, and the progress of each split."""

  def __init__(self, folder: Path, request: Request, progress: bool):
    self._folder, self._request, self._show_progress = folder, request, progress
    self._request_json = request.to_json()
    saved = read_checksummed_json(folder / PROGRESS) or {"request": self._request_json}
    _check_request(folder, saved["request"], self._request_json)
    _check_code_versions(folder, saved, _code_versions(request))
    _check_bad_rows(folder, [saved.get(name, {}) for name in SPLITS], request)
    self._splits = {name: _split_progress(saved.get(name, {})) for name in SPLITS}

  def run(self, corpus: Corpus) -> dict:
    """Completes the folder and returns the manifest, which is written last."""
    self._save()
    loaded = self._write_tokenizer(corpus)
    self._fill_split("train", corpus.train, loaded, self._request.take)
    if corpus.valid is not None:
      self._fill_split("valid", corpus.valid, loaded, None)
    manifest = {
      "request": self._request_json,
      "tokenizer": tokenizer.tokenizer_sha256(tokenizer_in(self._folder)),
      "train": _sizes(self._splits["train"], self._request),
      "valid": _sizes(self._splits["valid"], self._request) if corpus.valid is not None else None,
      "notes": dict(corpus.notes),
    }
    write_checksummed_json(self._folder / MANIFEST, manifest)
    (self._folder / PROGRESS).unlink()
    return manifest

  def _save(self):
    versions = _code_versions(self._request)
    splits = {name: asdict(split) for name, split in self._splits.items()}
    write_checksummed_json(self._folder / PROGRESS, {"request": self._request_json} | versions | splits)

  def _write_tokenizer(self, corpus: Corpus) -> tokenizer.Tokenizer:
    """Copies the tokenizer into the folder, or trains it there, and loads it."""
    requested = self._request.tokenizer
    fast = is_fast(requested) or requested.startswith(tokenizer.TRAIN_BYTES)
    path = self._folder / (FAST if fast else SENTENCEPIECE)
    if (size := self._request.size_to_train) is None:
      keep_tokenizer(Path(requested), self._folder)
    elif not path.exists():
      tokenizer.train_tokenizer(itertools.chain.from_iterable(corpus.train), size, path)
    loaded = tokenizer.load_tokenizer(path)
    # Not for SentencePiece: T5's model changes text, as in the paper.
    if fast and (example := tokenizer.lossy_example(loaded)):
      log.warning("%s changes text: %r is decoded as %r; bits per byte count the original bytes", requested, *example)
    return loaded

  def _fill_split(self, name: str, parts: packing.Parts, loaded: tokenizer.Tokenizer, take: int | None):
    """Packs the rest of a split, of at most `take` documents in all."""
    split = self._splits[name]
    if split.complete:
      return
    chunks = packing.read_chunks(parts, split.position)
    if take is not None:
      chunks = packing.first_documents(chunks, take - split.documents)
    fraction = lambda: split.documents / take if take else split.position.part / len(parts)
    encoded = self._with_progress(packing.encode_chunks(loaded, chunks), name, split, fraction)
    options = dict(seq_len=self._request.seq_len, save=self._save)
    options["dtype"] = packing.row_dtype(loaded.size, self._request.packing)
    options["eos"] = loaded.eos if self._request.packing == "pad" else None
    packing.pack(split, encoded, self._folder, name, **options)

  def _with_progress(
    self, encoded: Iterator[EncodedGroup], name: str, split: SplitProgress, fraction: Callable[[], float]
  ) -> Iterator[EncodedGroup]:
    """Yields the groups and shows a progress bar, whose total is estimated from the fraction of the text read."""
    options = dict(desc=f"tokenize {name}", unit="char", unit_scale=True, initial=split.characters)
    with progress_bar(**options, shown=self._show_progress) as bar:
      for group in encoded:
        yield group
        bar.total = round(split.characters / fraction()) if fraction() else None
        bar.update(group.characters)


def _split_progress(saved: dict) -> SplitProgress:
  """The progress of a split as saved in `progress.json`."""
  return SplitProgress(**saved | {"position": Position(*saved.get("position", ()))})


def _sizes(split: SplitProgress, request: Request) -> dict:
  """The entry of a split in the manifest; `cut_tokens` and `padding`, in tokens, only if rows are padded."""
  left_out = ("position", "rest", "complete", "unfinished", "cut_tokens")
  sizes = {key: value for key, value in asdict(split).items() if key not in left_out}
  if request.packing == "pad":
    padding = split.rows * request.seq_len - (split.tokens - split.cut_tokens)
    sizes |= {"cut_tokens": split.cut_tokens, "padding": padding}
  return sizes
