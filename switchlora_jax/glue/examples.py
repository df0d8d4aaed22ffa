"""GLUE examples as token ids, and padded batches of them."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from switchlora_jax.data.loader import shuffled_indices
from switchlora_jax.data.tokenizer import Tokenizer
from switchlora_jax.glue.tasks import LabelledTexts


class Examples(NamedTuple):
  """Tokenized examples.

  Attributes:
    tokens: one int32 array per example, which ends with EOS.
    labels: [examples], as in `LabelledTexts`.
  """

  tokens: list[np.ndarray]
  labels: np.ndarray


class LabelledBatch(NamedTuple):
  """A padded batch of examples.

  Attributes:
    tokens: [batch, length] int32, padded with 0 on the right.
    last: [batch] int32, index of the last token of each example.
    labels: [batch].
    weights: [batch] float32, 1 for examples and 0 for the padding of an incomplete batch.
  """

  tokens: np.ndarray
  last: np.ndarray
  labels: np.ndarray
  weights: np.ndarray


def encode_examples(texts: LabelledTexts, tokenizer: Tokenizer, seq_len: int, prefix: tuple[int, ...] = ()) -> Examples:
  """Tokenizes sentences, each followed by EOS as documents are in pre-training: `A eos` or `A eos B eos`.

  Args:
    texts: the sentences and labels.
    tokenizer: that of the pre-trained model.
    seq_len: maximum length. Tokens at the end of the longer sentence are dropped one by one until the example fits.
    prefix: ids at the start of every example, such as BOS. They count towards `seq_len`.
  """
  sentences = iter(tokenizer.encode(list(itertools.chain.from_iterable(texts.sentences))))
  length, eos = seq_len - len(prefix), tokenizer.eos
  tokens = [[*prefix, *_joined([next(sentences) for _ in row], eos, length)] for row in texts.sentences]
  return Examples([np.array(row, np.int32) for row in tokens], texts.labels)


def _joined(sentences: list[list[int]], eos: int, length: int) -> list[int]:
  """The sentences, each followed by `eos`, truncated to `length` tokens in all."""
  while sum(map(len, sentences)) > length - len(sentences):
    max(sentences, key=len).pop()
  return [token for sentence in sentences for token in (*sentence, eos)]


def padded_length(length: int) -> int:
  """Rounds up to 16, 24, 32, 48, 64, 96, …: few lengths to compile for, and above 16 less than a third is padding."""
  power = max(16, 1 << (length - 1).bit_length())
  return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power


def padded_batch(examples: Examples, indices: np.ndarray, size: int) -> LabelledBatch:
  """A batch of `size` examples. Its length is that of the longest example, rounded up by `padded_length`.

  Args:
    examples: to choose from.
    indices: [at most size], the examples in the batch.
    size: number of rows. Rows without an example have weight 0.
  """
  rows = [examples.tokens[index] for index in indices]
  tokens = np.zeros((size, padded_length(max(map(len, rows)))), np.int32)
  for padded, row in zip(tokens, rows, strict=False):
    padded[: len(row)] = row
  padding = size - len(rows)
  last = np.array([len(row) - 1 for row in rows] + [0] * padding, np.int32)
  weights = np.array([1] * len(rows) + [0] * padding, np.float32)
  return LabelledBatch(tokens, last, np.pad(examples.labels[indices], (0, padding)), weights)


def epoch_batches(examples: Examples, size: int, *, seed: int, epoch: int) -> Iterator[LabelledBatch]:
  """Batches with every example once, in a random order given by `seed` and `epoch`. The last may be incomplete."""
  count = len(examples.tokens)
  order = shuffled_indices(np.arange(count), count, seed=seed, epoch=epoch)
  yield from (padded_batch(examples, order[start : start + size], size) for start in range(0, count, size))
