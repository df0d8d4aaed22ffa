"""A folder of packed rows, filled once. Killed at any moment and started again, it ends with the same bytes.

Whenever a shard is full, `progress.json` says how far the text was read. The manifest is written last.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from switchlora_jax.data import packing, tokenizer
from switchlora_jax.data.corpus import Corpus
from switchlora_jax.data.packing import Encoded, Position, Split
from switchlora_jax.data.shards import MANIFEST, TOKENIZER, read_manifest
from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import (
  LockTaken,
  exclusive_lock,
  file_sha256,
  read_checksummed_json,
  write_bytes,
  write_checksummed_json,
)

PROGRESS = "progress.json"
TRAIN = "train:"  # before the number of pieces of a tokenizer that is trained on the text


class Request(NamedTuple):
  """All that decides the rows.

  Attributes:
    text: what is read, as JSON has it: it changes when the text may have changed.
    tokenizer: a SentencePiece model, or `train:SIZE`.
    seq_len: tokens a row.
    take: training documents, at most.
  """

  text: list | dict
  tokenizer: str
  seq_len: int
  take: int | None = None

  def facts(self) -> dict:
    """The same as JSON gives it back, with a checksum for the tokenizer's file."""
    trained = self.tokenizer.startswith(TRAIN)
    facts = self._asdict() | {"tokenizer": self.tokenizer if trained else file_sha256(Path(self.tokenizer))}
    return json.loads(json.dumps(facts))


def prepare(folder: Path, request: Request, read: Callable[[], Corpus], *, wait: bool, progress: bool) -> dict:
  """The manifest of `folder`, once it is filled with the packed rows of a corpus.

  Args:
    read: the corpus; called where the folder is not finished.
    wait: for another process that fills the folder; else that is a mistake.
    progress: whether to show it.
  Raises:
    UserError: the folder holds other rows, is being filled or cannot be written, or the text cannot be read.
  """
  try:
    if not _is_done(folder):  # what is finished is only read: it may lie where nothing can be written
      folder.mkdir(parents=True, exist_ok=True)
      with _alone(folder, wait):
        if (manifest := read_manifest(folder)) is None:
          return _Preparation(folder, request, progress).run(read())
        (folder / PROGRESS).unlink(missing_ok=True)  # of a process that was killed after its last shard
    manifest = read_manifest(folder)
    _check_request(folder, manifest["request"], request.facts())
    return manifest
  except OSError as error:
    raise UserError(
      f"{folder} must be a directory that can be written, with room for the rows; {error}; make room, and the same "
      "command goes on where it stopped, or choose another directory"
    ) from error


def _is_done(folder: Path) -> bool:
  return os.access(folder / MANIFEST, os.R_OK) and not (folder / PROGRESS).exists()


@contextlib.contextmanager
def _alone(folder: Path, wait: bool) -> Iterator[None]:
  """While no other process fills the folder."""
  try:
    with exclusive_lock(folder, wait=wait):
      yield
  except LockTaken as holder:
    raise UserError(
      f"another process is filling {folder}; wait until it ends, or choose another directory ({holder})"
    ) from None


def _check_request(folder: Path, found: dict, facts: dict):
  keys = sorted(key for key in facts.keys() | found.keys() if found.get(key) != facts.get(key))
  if keys:
    changed = "; ".join(f"{key} was {found.get(key)!r:.80} and is {facts.get(key)!r:.80}" for key in keys)
    raise UserError(f"{folder} was begun for other rows ({changed}); choose a new directory, or delete this one")


class _Preparation:
  """The work on one folder: what is asked for, and what was made of each split so far."""

  def __init__(self, folder: Path, request: Request, progress: bool):
    self._folder, self._request, self._shown = folder, request, progress
    self._facts = request.facts()
    saved = read_checksummed_json(folder / PROGRESS) or {"request": self._facts}
    _check_request(folder, saved["request"], self._facts)
    self._splits = {name: _split(saved.get(name, {})) for name in ("train", "valid")}

  def run(self, corpus: Corpus) -> dict:
    """Do what is left, and write the manifest."""
    self._save()
    model = self._put_tokenizer(corpus)
    self._fill("train", corpus.train, model, self._request.take)
    if corpus.valid is not None:
      self._fill("valid", corpus.valid, model, None)
    manifest = {
      "request": self._facts,
      "tokenizer": file_sha256(self._folder / TOKENIZER),
      "train": _sizes(self._splits["train"]),
      "valid": _sizes(self._splits["valid"]) if corpus.valid is not None else None,
      "notes": dict(corpus.notes),
    }
    write_checksummed_json(self._folder / MANIFEST, manifest)
    (self._folder / PROGRESS).unlink()
    return manifest

  def _save(self):
    write_checksummed_json(
      self._folder / PROGRESS, {"request": self._facts} | {k: asdict(v) for k, v in self._splits.items()}
    )

  def _put_tokenizer(self, corpus: Corpus):
    """The tokenizer of the folder, which is made or copied there first."""
    path, wanted = self._folder / TOKENIZER, self._request.tokenizer
    if not wanted.startswith(TRAIN):
      write_bytes(path, Path(wanted).read_bytes())
    elif not path.exists():
      documents = itertools.chain.from_iterable(corpus.train)
      tokenizer.train_tokenizer(documents, int(wanted.removeprefix(TRAIN)), path)
    return tokenizer.load_tokenizer(path)

  def _fill(self, name: str, parts: packing.Parts, model, take: int | None):
    """Pack what is left of a split."""
    split = self._splits[name]
    if split.complete:
      return
    pieces = packing.pieces(parts, split.position)
    if take is not None:
      pieces = packing.first(pieces, take - split.documents)
    dtype = np.uint16 if model.get_piece_size() <= 1 << 16 else np.int32
    share = lambda: split.documents / take if take else split.position.part / len(parts)
    encoded = self._watched(packing.encode(model, pieces), name, split, share)
    packing.pack(split, encoded, self._folder, name, seq_len=self._request.seq_len, dtype=dtype, save=self._save)

  def _watched(self, encoded: Iterator[Encoded], name: str, split: Split, share: Callable) -> Iterator[Encoded]:
    """The same, with a bar, whose end is guessed from the share of the text that was read."""
    options = dict(desc=f"tokenize {name}", unit="char", unit_scale=True, initial=split.characters)
    with tqdm(**options, disable=not self._shown) as bar:
      for group in encoded:
        yield group
        bar.total = round(split.characters / share()) if share() else None
        bar.update(group.characters)


def _split(saved: dict) -> Split:
  return Split(**saved | {"position": Position(*saved.get("position", ()))})


def _sizes(split: Split) -> dict:
  """What the manifest says of a split."""
  return {key: value for key, value in asdict(split).items() if key not in ("position", "rest", "complete")}
