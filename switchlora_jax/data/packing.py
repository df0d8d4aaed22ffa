"""Packing: documents → tokens → sequences, by one of two rules, `config.data.packing`.

With `pack`, documents are joined, each ended by EOS, and cut into sequences. Tokens that do not fill the last sequence
are dropped. With `pad`, each document is one sequence: cut or padded to its length (`pad_documents`).

Progress can be saved after each shard and resumed from there.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from switchlora_jax.data.readers import BadRow, Document, pieces_of
from switchlora_jax.data.shards import PAD, write_shard
from switchlora_jax.data.tokenizer import Tokenizer
from switchlora_jax.errors import UserError

log = logging.getLogger(__name__)

GROUP = 1_000_000  # characters per call of the tokenizer, and per chunk of a document at most
SHARD = 1 << 25  # tokens per shard, at most

Parts = Sequence[Iterable[Document | BadRow]]


# Text → tokens.


class Position(NamedTuple):
  """Reading position in a corpus.

  Attributes:
    part: number of parts that were read completely.
    document: number of documents, and of rows without text, of the next part that were read completely.
    character: number of characters of the next document that were read.
  """

  part: int = 0
  document: int = 0
  character: int = 0


START = Position()


class Chunk(NamedTuple):
  """Text of one document: all of it, or a part of a long one.

  Attributes:
    text: the characters.
    ends: whether the document ends with this chunk.
    after: the position after the chunk.
    bad_rows: number of rows without text between the previous chunk and this one.
  """

  text: str
  ends: bool
  after: Position
  bad_rows: int = 0


class EncodedGroup(NamedTuple):
  """The tokens of a group of chunks.

  Attributes:
    tokens: [tokens], int32.
    documents: number of documents that end in the group.
    characters: length of the text in characters.
    bytes: length of the text in UTF-8.
    after: the position after the group.
    bad_rows: number of rows without text in the group.
  """

  tokens: np.ndarray
  documents: int
  characters: int
  bytes: int
  after: Position
  bad_rows: int


def read_chunks(parts: Parts, start: Position = START) -> Iterator[Chunk]:
  """Reads the documents from `start` on. Empty documents are skipped.

  Documents longer than `GROUP` characters are cut, after a newline where possible. Rows without text are counted, and
  the first one of each part is logged.
  """
  for part in range(start.part, len(parts)):
    first = start.document if part == start.part else 0
    bad, reported = 0, 0
    for number, document in enumerate(itertools.islice(parts[part], first, None), first):
      if isinstance(document, BadRow):
        if not bad:
          log.warning("%s: found %s; such rows are left out and counted", document.where, document.found)
        bad += 1
        continue
      at = start.character if (part, number) == start[:2] else 0
      for text, ends in _cut(document, at):
        at += len(text)
        yield Chunk(text, ends, Position(part, number + 1) if ends else Position(part, number, at), bad - reported)
        reported = bad
    if bad > reported:
      yield Chunk("", False, Position(part + 1), bad - reported)


def _cut(document: Document, start: int) -> Iterator[tuple[str, bool]]:
  """Cuts the document from a character on into chunks; returns them, each with whether it is the last one."""
  text, at = "", 0
  for piece in pieces_of(document):
    skipped = min(start, len(piece))
    start -= skipped
    text, at = text[at:] + piece[skipped:], 0
    while len(text) - at > GROUP:
      cut = text.rfind("\n", at, at + GROUP) + 1 or at + GROUP
      yield text[at:cut], False
      at = cut
  if len(text) > at:
    yield text[at:], True


def first_documents(chunks: Iterator[Chunk], count: int) -> Iterator[Chunk]:
  """The chunks of the first `count` documents."""
  if count <= 0:
    return
  for chunk in chunks:
    yield chunk
    count -= chunk.ends
    if not count:
      return


def encode_chunks(tokenizer: Tokenizer, chunks: Iterator[Chunk]) -> Iterator[EncodedGroup]:
  """Tokenizes chunks on all cores, in groups of about `GROUP` characters, and appends EOS to each document.

  A thread reads the next group meanwhile.
  """
  eos = [tokenizer.eos]
  for group in _prefetch(_grouped(chunks)):
    texts = [chunk.text for chunk in group]
    ids = zip(tokenizer.encode(texts), group, strict=True)
    tokens = np.concatenate([np.asarray(tokens + eos * chunk.ends, np.int32) for tokens, chunk in ids])
    characters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    documents, bad_rows = sum(chunk.ends for chunk in group), sum(chunk.bad_rows for chunk in group)
    yield EncodedGroup(tokens, documents, characters, size, group[-1].after, bad_rows)


def _grouped(chunks: Iterator[Chunk]) -> Iterator[list[Chunk]]:
  group, characters = [], 0
  for chunk in chunks:
    group.append(chunk)
    characters += len(chunk.text)
    if characters >= GROUP:
      yield group
      group, characters = [], 0
  if group:
    yield group


def _prefetch(items: Iterator[list]) -> Iterator[list]:
  """Yields the items unchanged. A thread fetches the next one while the current one is used."""
  with ThreadPoolExecutor(1) as pool:
    coming = pool.submit(next, items, None)
    while (item := coming.result()) is not None:
      coming = pool.submit(next, items, None)
      yield item


# Tokens → sequences on disk.


@dataclass
class SplitProgress:
  """Progress of a split: totals of the text that was read, the shards that were written, and where to continue.

  The fields are the keys of a split in `progress.json` and in the manifest.
  """

  documents: int = 0
  characters: int = 0
  bytes: int = 0
  tokens: int = 0
  rows: int = 0  # sequences in `shards`
  bad_rows: int = 0  # rows without text that were skipped
  shards: list = field(default_factory=list)
  position: Position = START
  rest: list = field(default_factory=list)  # tokens read but not yet in a shard
  complete: bool = False
  cut_tokens: int = 0  # with padding: tokens that were cut off at the end of long documents
  unfinished: list = field(default_factory=list)  # with padding: the first tokens of a document that was read in part

  def count(self, encoded: EncodedGroup):
    """Adds an encoded group to the totals."""
    self.documents += encoded.documents
    self.characters += encoded.characters
    self.bytes += encoded.bytes
    self.tokens += len(encoded.tokens)
    self.bad_rows += encoded.bad_rows
    self.position = encoded.after

  def pad(self, tokens: np.ndarray, seq_len: int, eos: int) -> np.ndarray:
    """The rows of the documents that end in `tokens`, see `pad_documents`; updates `cut_tokens` and `unfinished`."""
    tokens = np.concatenate([np.asarray(self.unfinished, np.int32), tokens])
    rows, unfinished, cut = pad_documents(tokens, seq_len, eos)
    self.unfinished, self.cut_tokens = unfinished.tolist(), self.cut_tokens + cut
    return rows


def pad_documents(tokens: np.ndarray, seq_len: int, eos: int) -> tuple[np.ndarray, np.ndarray, int]:
  """One row per document: at most its first `seq_len - 1` tokens, then EOS, then `PAD`.

  This is the result of T5's tokenizer in Hugging Face with `max_length`, `truncation` and `padding="max_length"`, with
  another id of padding: EOS stays, and the tokens of the document that do not fit before it are dropped.

  Args:
    tokens: [tokens], int32, documents that end with EOS; the last one may not have ended yet.
    seq_len: tokens per row.
    eos: the id of EOS, which text does not contain.

  Returns:
    The rows of the documents that end, int32 [documents, seq_len]; the first `seq_len - 1` tokens of the one that does
    not; and the number of tokens that were cut off.
  """
  ends = np.flatnonzero(tokens == eos)
  lengths = np.diff(ends, prepend=-1) - 1
  kept = np.minimum(lengths, seq_len - 1)
  whole = lengths.sum() + len(ends)
  positions = np.arange(whole) - np.repeat(ends - lengths, lengths + 1)  # within the document
  rows = np.full((len(ends), seq_len), PAD, np.int32)
  rows[np.arange(seq_len) < kept[:, None]] = tokens[:whole][positions < np.repeat(kept, lengths + 1)]
  rows[np.arange(len(ends)), kept] = eos
  unfinished = tokens[whole:]
  cut = (lengths - kept).sum() + max(0, len(unfinished) - (seq_len - 1))
  return rows, unfinished[: seq_len - 1], int(cut)


def row_dtype(pieces: int, packing: str) -> np.dtype:
  """The dtype of shards for a tokenizer of `pieces` ids: uint16 if it holds them, and with padding one more."""
  return np.dtype(np.uint16 if pieces + (packing == "pad") <= 1 << 16 else np.int32)


def pack(
  split: SplitProgress,
  encoded: Iterator[EncodedGroup],
  folder: Path,
  name: str,
  *,
  seq_len: int,
  dtype,
  save: Callable[[], None],
  eos: int | None = None,
):
  """Writes the remaining shards of a split, `NAME-00000.npy` and so on, each [rows, seq_len].

  Args:
    split: progress so far, updated in place.
    encoded: the tokens of all text after `split.position`.
    folder: where the shards are written.
    name: the split, `train` or `valid`.
    seq_len: tokens per sequence.
    dtype: of the shards.
    save: called after each full shard, and at the end, to store `split`.
    eos: the id of EOS if each document is to be one row; None: documents are joined.

  Raises:
    UserError: the text does not fill one sequence. No shard was written in this case.
  """
  rows_per_shard = max(1, SHARD // seq_len)
  buffer = [np.asarray(split.rest, dtype)]

  def write_shards(rows: int):
    """Writes shards of `rows` sequences from `buffer` until fewer remain."""
    tokens = np.concatenate(buffer)
    while len(tokens) >= rows * seq_len > 0:
      shard, tokens = tokens[: rows * seq_len], tokens[rows * seq_len :]
      path = folder / f"{name}-{len(split.shards):05}.npy"
      split.shards.append(write_shard(path, shard.reshape(rows, seq_len)))
      split.rows += rows
    buffer[:] = [tokens]

  for group in encoded:
    split.count(group)
    tokens = group.tokens if eos is None else split.pad(group.tokens, seq_len, eos).reshape(-1)
    buffer.append(tokens.astype(dtype))
    if sum(map(len, buffer)) >= rows_per_shard * seq_len:
      write_shards(rows_per_shard)
      split.rest = buffer[0].tolist()
      save()
  write_shards(sum(map(len, buffer)) // seq_len)
  if not split.rows:
    raise UserError(
      f"the text of {folder / name} must hold at least one row of {seq_len} tokens; it has {split.tokens:,} "
      f"tokens in {split.documents:,} non-empty documents{_describe_skipped(split.bad_rows)}; add text, or ask for "
      "shorter rows"
    )
  split.rest, split.complete = [], True
  save()


def _describe_skipped(bad_rows: int) -> str:
  return f" (bad rows skipped: {bad_rows:,})" if bad_rows else ""
