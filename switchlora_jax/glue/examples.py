"""Labelled texts as token ids, and batches of them with little padding."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import sentencepiece

from switchlora_jax.data.order import shuffled
from switchlora_jax.glue.tasks import Rows


class Examples(NamedTuple):
  """Rows as token ids: an int32 array for each, its last the end of the text; labels as in `Rows`."""

  tokens: list[np.ndarray]
  labels: np.ndarray


class Batch(NamedTuple):
  """Rows that are computed together: tokens [batch, length] int32, filled up with 0 on the right; last [batch] int32,
  the place of each row's last token; labels [batch]; weights [batch] float32, 0 where there is no row.
  """

  tokens: np.ndarray
  last: np.ndarray
  labels: np.ndarray
  weights: np.ndarray


def encode(
  rows: Rows, processor: sentencepiece.SentencePieceProcessor, seq_len: int, prefix: tuple[int, ...] = ()
) -> Examples:
  """`prefix`, then each sentence with the end of sentence behind it, as documents were joined in pre-training:
  `A eos B eos`.

  What is longer than `seq_len` loses tokens at the end of its longer sentence, one by one.
  """
  sentences, room = iter(processor.encode(list(itertools.chain.from_iterable(rows.texts)))), seq_len - len(prefix)
  tokens = [[*prefix, *_joined([next(sentences) for _ in row], processor.eos_id(), room)] for row in rows.texts]
  return Examples([np.array(row, np.int32) for row in tokens], rows.labels)


def _joined(sentences: list[list[int]], eos: int, room: int) -> list[int]:
  while sum(map(len, sentences)) > room - len(sentences):
    max(sentences, key=len).pop()
  return [token for sentence in sentences for token in (*sentence, eos)]


def bucket(length: int) -> int:
  """The next of 16, 24, 32, 48, 64, 96, …: few programs to compile, and beyond 16 less than a third is padding."""
  power = max(16, 1 << (length - 1).bit_length())
  return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power


def batch(examples: Examples, picks: np.ndarray, size: int) -> Batch:
  """The examples at `picks` [at most size], cut to the longest of them, rounded up by `bucket`."""
  rows = [examples.tokens[pick] for pick in picks]
  tokens = np.zeros((size, bucket(max(map(len, rows)))), np.int32)
  for place, row in zip(tokens, rows, strict=False):
    place[: len(row)] = row
  fill = size - len(rows)
  last = np.array([len(row) - 1 for row in rows] + [0] * fill, np.int32)
  weights = np.array([1] * len(rows) + [0] * fill, np.float32)
  return Batch(tokens, last, np.pad(examples.labels[picks], (0, fill)), weights)


def epoch_of(examples: Examples, size: int, *, seed: int, epoch: int) -> Iterator[Batch]:
  """Every example once, in an order that is a function of seed and epoch; the last batch may lack rows."""
  count = len(examples.tokens)
  order = shuffled(np.arange(count), count, seed=seed, epoch=epoch)
  yield from (batch(examples, order[start : start + size], size) for start in range(0, count, size))
