"""The batch of step t, a pure function of (seed, t): which rows it has, and those of them that are read."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from switchlora_jax.data.order import shuffled
from switchlora_jax.data.shards import Rows
from switchlora_jax.data.stream import Stream


@dataclass(frozen=True)
class Batch:
  """Rows of `rows` [n, seq_len] by their numbers, `picks` [batch]; read when it is sliced, and only that slice."""

  rows: Rows | np.ndarray
  picks: np.ndarray

  @property
  def shape(self) -> tuple[int, int]:
    """(batch, seq_len)."""
    return len(self.picks), self.rows.shape[1]

  def __getitem__(self, part: slice) -> np.ndarray:
    """That part of the batch, int32 [part, seq_len]."""
    return np.asarray(self.rows[self.picks[part]], np.int32)


def by_step(train: Rows | Stream, config) -> Callable[[int], Batch]:
  """From a step to its batch."""
  if isinstance(train, Stream):
    return lambda step: Batch(train.batch(step, config.batch_size), np.arange(config.batch_size))
  return lambda step: batch(train, seed=config.seed, step=step, batch_size=config.batch_size)


def batch(rows: Rows | np.ndarray, *, seed: int, step: int, batch_size: int) -> Batch:
  """The batch of a step, [batch_size, seq_len]: each epoch takes every row once, in an order of its own."""
  epochs, places = np.divmod(step * batch_size + np.arange(batch_size), len(rows))
  each = [shuffled(places[epochs == epoch], len(rows), seed=seed, epoch=epoch) for epoch in np.unique(epochs)]
  return Batch(rows, np.concatenate(each))
