"""Mixtures of texts: which text each row of a run comes from.

The rows of a run are counted over all batches. Row n comes from a text, and has a position in it, that depend on n and
the shares alone: a run that continues sees the same rows. After any number of rows, each text has had its share of
them, rounded down once for each text before it.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from switchlora_jax.data.shards import PackedSequences

PARTS = 10_000  # shares are multiples of 1 / PARTS


class Mixture(NamedTuple):
  """A text with the rows of other texts between its own.

  Attributes:
    main: the text that has the rest of the rows: [sequences, seq_len] on disk, or a `loader.SequenceStream`.
    others: the other texts.
    shares: of each other text in the rows of a run, multiples of 1 / `PARTS`; their sum is less than 1.
  """

  main: PackedSequences
  others: tuple[PackedSequences, ...]
  shares: tuple[Fraction, ...]

  @property
  def cut_tokens(self) -> int | None:
    """`cut_tokens` of `main` if it is a stream, else None."""
    return getattr(self.main, "cut_tokens", None)


def locate(rows: np.ndarray, shares: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
  """The text of each row, and the position of the row in it.

  Args:
    rows: int64 [n], numbers of rows.
    shares: of each text but the main one.

  Returns:
    texts: int64 [n], 0 for the main text and j for that of `shares[j - 1]`.
    positions: int64 [n]. The rows of a text have the positions 0, 1, … without a gap.
  """
  texts, positions = np.zeros_like(rows), rows.copy()
  for text, (part, whole) in enumerate(_of_the_rest(shares), 1):
    left = texts == 0
    before, after = positions * part // whole, (positions + 1) * part // whole
    texts[left & (after > before)] = text
    positions = np.where(left, np.where(after > before, before, positions - before), positions)
  return texts, positions


def row_counts(rows: int, shares: Sequence[Fraction]) -> list[int]:
  """Numbers of rows of each text, the main one first, in the first `rows` rows."""
  counts = []
  for part, whole in _of_the_rest(shares):
    counts.append(rows * part // whole)
    rows -= counts[-1]
  return [rows, *counts]


def _of_the_rest(shares: Sequence[Fraction]) -> list[tuple[int, int]]:
  """(numerator, denominator) of each share relative to the rows that the texts before it leave."""
  left, found = Fraction(1), []
  for share in shares:
    found.append((share / left).as_integer_ratio())
    left -= share
  return found


class JoinedSequences:
  """The sequences of several texts, one after the other, [n, seq_len]. Tokens are read on indexing.

  Args:
    texts: sequences of the same length, on disk or as arrays.
  """

  def __init__(self, texts: Sequence[PackedSequences | np.ndarray]):
    self._texts = texts
    self.starts = np.cumsum([0, *map(len, texts)])  # [texts + 1], index of the first sequence of each text

  @property
  def shape(self) -> tuple[int, int]:
    """(number of sequences, seq_len)."""
    return int(self.starts[-1]), self._texts[0].shape[1]

  def __getitem__(self, indices: np.ndarray) -> np.ndarray:
    """The tokens of the sequences `indices` [n], int32 [n, seq_len]."""
    tokens = np.empty((len(indices), self.shape[1]), np.int32)
    found = np.searchsorted(self.starts, indices, side="right") - 1
    for text in np.unique(found):
      here = found == text
      tokens[here] = self._texts[text][indices[here] - self.starts[text]]
    return tokens
