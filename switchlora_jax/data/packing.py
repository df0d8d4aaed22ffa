"""Documents → tokens → rows: documents are joined, each ended by EOS, and cut into rows; the remainder is dropped.

How far it came can be written down between any two groups of documents, and taken up again from there.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from switchlora_jax.data.shards import write_shard
from switchlora_jax.errors import UserError

GROUP = 1_000_000  # characters that are encoded at once, and the longest piece of a document
SHARD = 1 << 25  # tokens of a full shard, at most

Parts = Sequence[Iterable[str]]


# Text → tokens.


class Position(NamedTuple):
  """How far a corpus was read: parts and documents that were read whole, and the characters of the next document."""

  part: int = 0
  document: int = 0
  character: int = 0


START = Position()


class Piece(NamedTuple):
  """Text of a document, whether the document ends with it, and the position behind it."""

  text: str
  ends: bool
  after: Position


class Encoded(NamedTuple):
  """The tokens of some pieces, [tokens] int32, what they were made from, and the position behind it."""

  tokens: np.ndarray
  documents: int
  characters: int
  bytes: int
  after: Position


def pieces(parts: Parts, start: Position = START) -> Iterator[Piece]:
  """The documents from `start` on, the long ones cut after a newline so that each piece fits; empty ones left out."""
  for part in range(start.part, len(parts)):
    read = start.document if part == start.part else 0
    for number, document in enumerate(itertools.islice(parts[part], read, None), read):
      at = start.character if (part, number) == start[:2] else 0
      while len(document) - at > GROUP:
        cut = document.rfind("\n", at, at + GROUP) + 1 or at + GROUP
        yield Piece(document[at:cut], False, Position(part, number, cut))
        at = cut
      if document:
        yield Piece(document[at:], True, Position(part, number + 1))


def encode(processor: sentencepiece.SentencePieceProcessor, found: Iterator[Piece]) -> Iterator[Encoded]:
  """The tokens of pieces, about a million characters at a time, on all cores; the next ones are read meanwhile."""
  eos = [processor.eos_id()]
  for group in _ahead(_groups(found)):
    texts = [piece.text for piece in group]
    ids = zip(processor.encode(texts), group, strict=True)
    tokens = np.concatenate([np.asarray(tokens + eos * piece.ends, np.int32) for tokens, piece in ids])
    characters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    yield Encoded(tokens, sum(piece.ends for piece in group), characters, size, group[-1].after)


def _groups(found: Iterator[Piece]) -> Iterator[list[Piece]]:
  group, characters = [], 0
  for piece in found:
    group.append(piece)
    characters += len(piece.text)
    if characters >= GROUP:
      yield group
      group, characters = [], 0
  if group:
    yield group


def _ahead(items: Iterator[list]) -> Iterator[list]:
  """The same items, the next of which is fetched by a thread while one is used."""
  with ThreadPoolExecutor(1) as pool:
    coming = pool.submit(next, items, None)
    while (item := coming.result()) is not None:
      coming = pool.submit(next, items, None)
      yield item


def first(found: Iterator[Piece], documents: int) -> Iterator[Piece]:
  """The pieces of the first so many documents."""
  if documents <= 0:
    return
  for piece in found:
    yield piece
    documents -= piece.ends
    if not documents:
      return


# Tokens → rows on disk.


@dataclass
class Split:
  """What was made of a corpus so far: the sums of what was read, the shards, and where to go on."""

  documents: int = 0
  characters: int = 0
  bytes: int = 0
  tokens: int = 0
  rows: int = 0
  shards: list = field(default_factory=list)
  position: Position = START
  rest: list = field(default_factory=list)  # tokens that did not fill a shard yet
  complete: bool = False

  def count(self, encoded: Encoded):
    """Add what was encoded to the sums."""
    self.documents += encoded.documents
    self.characters += encoded.characters
    self.bytes += encoded.bytes
    self.tokens += len(encoded.tokens)
    self.position = encoded.after


def pack(split: Split, encoded: Iterator[Encoded], folder: Path, name: str, *, seq_len: int, dtype, save: Callable):
  """Write what is encoded as further shards `name-00000.npy` … of a split; `save()` after those that are full.

  Args:
    split: what the folder already holds; brought up to date.
    encoded: all that comes behind `split.position`.
  Raises:
    UserError: it is not enough for a row; then nothing was written.
  """
  each = max(1, SHARD // seq_len)
  waiting = [np.asarray(split.rest, dtype)]

  def write(rows: int):
    """Move shards of so many rows from `waiting` to the disk, as long as there are whole ones."""
    tokens = np.concatenate(waiting)
    while len(tokens) >= rows * seq_len > 0:
      shard, tokens = tokens[: rows * seq_len], tokens[rows * seq_len :]
      path = folder / f"{name}-{len(split.shards):05}.npy"
      split.shards.append(write_shard(path, shard.reshape(rows, seq_len)))
      split.rows += rows
    waiting[:] = [tokens]

  for group in encoded:
    split.count(group)
    waiting.append(group.tokens.astype(dtype))
    if sum(map(len, waiting)) >= each * seq_len:
      write(each)
      split.rest = waiting[0].tolist()
      save()
  write(sum(map(len, waiting)) // seq_len)
  if not split.rows:
    raise UserError(
      f"the text of {folder / name} must hold at least one row of {seq_len} tokens; it has {split.tokens:,}, of "
      f"{split.documents:,} documents that are not empty; add text, or ask for shorter rows"
    )
  split.rest, split.complete = [], True
  save()
