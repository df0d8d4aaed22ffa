"""Data loader: the batch of step t is a pure function of (seed, t).

`make_batch_fn` returns the function from a step to its batch. Sequences on disk are shuffled per epoch
(`shuffled_batch`). A `SequenceStream` packs sequences while the text is read, in the order of the text. The rows of a
`Mixture` come from several texts (`mixed_batch`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from switchlora_jax.data import packing, tokenizer
from switchlora_jax.data.mixture import JoinedSequences, Mixture, locate
from switchlora_jax.data.shards import PackedSequences
from switchlora_jax.errors import UserError

ROUNDS = 8  # of the Feistel network


@dataclass(frozen=True)
class Batch:
  """The batch of one step. Tokens are read on indexing, and only those of the requested slice.

  Attributes:
    sequences: [n, seq_len], the source of the tokens.
    indices: [batch_size], int64, the sequences in the batch.
  """

  sequences: PackedSequences | JoinedSequences | np.ndarray
  indices: np.ndarray

  @property
  def shape(self) -> tuple[int, int]:
    """(batch_size, seq_len)."""
    return len(self.indices), self.sequences.shape[1]

  def __getitem__(self, part: slice) -> np.ndarray:
    """Tokens of a slice of the batch, int32 [slice, seq_len]."""
    return np.asarray(self.sequences[self.indices[part]], np.int32)


def make_batch_fn(train: "PackedSequences | SequenceStream | Mixture", config) -> Callable[[int], Batch]:
  """Returns the function from a step, counted from 0, to its batch. Uses `config.batch_size` and `config.seed`."""
  size = config.batch_size
  if isinstance(train, Mixture):
    return lambda step: mixed_batch(train, seed=config.seed, step=step, batch_size=size)
  if isinstance(train, SequenceStream):
    return lambda step: Batch(train.rows(step * size, size, step), np.arange(size))
  return lambda step: shuffled_batch(train, seed=config.seed, step=step, batch_size=size)


def mixed_batch(train: Mixture, *, seed: int, step: int, batch_size: int) -> Batch:
  """The batch of a step, [batch_size, seq_len], of rows from several texts: see `mixture`.

  The rows of each text are those that a run on this text alone would have, in the same order.
  """
  of_row, positions = locate(step * batch_size + np.arange(batch_size), train.shares)
  main, rows = train.main, positions[of_row == 0]
  if isinstance(main, SequenceStream):
    main, found = main.rows(int(rows[0]) if len(rows) else 0, len(rows), step), np.arange(len(rows))
  else:
    found = _shuffled(rows, len(main), seed)
  joined = JoinedSequences((main, *train.others))
  indices = np.empty(batch_size, np.int64)
  indices[of_row == 0] = found
  for number, text in enumerate(train.others, 1):
    here = of_row == number
    indices[here] = joined.starts[number] + _shuffled(positions[here], len(text), seed)
  return Batch(joined, indices)


# Sequences on disk.


def shuffled_batch(sequences: PackedSequences | np.ndarray, *, seed: int, step: int, batch_size: int) -> Batch:
  """The batch of a step, [batch_size, seq_len]. Every epoch contains each sequence once, in its own random order.

  Epochs follow each other without a gap: a batch may contain the end of one epoch and the start of the next.
  """
  return Batch(sequences, _shuffled(step * batch_size + np.arange(batch_size), len(sequences), seed))


def _shuffled(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
  """The sequences, of `size`, at positions in the order of a run, over all its epochs. int64 [n] -> int64 [n]."""
  epochs, positions = np.divmod(positions, size)
  indices = np.empty(len(positions), np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    indices[here] = shuffled_indices(positions[here], size, seed=seed, epoch=epoch)
  return indices


def shuffled_indices(positions: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
  """Evaluates a random permutation of range(size) at `positions`.

  The permutation is a Feistel network over the pairs (left, right) of a grid of at least `size` cells. Results outside
  range(size) are permuted again until they fall inside (cycle walking; Black and Rogaway, Ciphers with Arbitrary Finite
  Domains, 2002). It uses no memory, and each position can be evaluated on its own.

  Args:
    positions: integers in range(size), any shape.
    size: number of elements.
    seed: together with `epoch`, selects the permutation.
    epoch: see `seed`.

  Returns:
    int64, the shape of `positions`.
  """
  keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)
  indices = _feistel(np.array(positions, np.uint64, ndmin=1), size, keys)
  while (outside := indices >= size).any():
    indices[outside] = _feistel(indices[outside], size, keys)
  return indices.astype(np.int64).reshape(np.shape(positions))


def _feistel(cells: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
  """Permutes the cells of the smallest, nearly square grid with at least `size` cells. uint64 -> uint64."""
  width = np.uint64(math.isqrt(max(size - 1, 0)) + 1)
  height = np.uint64(-(-size // int(width)))
  right, left = np.divmod(cells, width)
  for key, next_key in keys.reshape(-1, 2):
    left = (left + _splitmix64(right ^ key) % width) % width
    right = (right + _splitmix64(left ^ next_key) % height) % height
  return right * width + left


def _splitmix64(x: np.ndarray) -> np.ndarray:
  """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every output bit depends on all input bits. uint64."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


# Streamed text.


class SequenceStream:
  """Packs sequences of `seq_len` tokens while the text is read, or pads them, for text that cannot be prepared.

  Nothing is stored: a resumed run reads and tokenizes the text from its start again. It sees the same sequences if the
  text yields the same documents in the same order. Every process reads the whole text.

  Args:
    padded: whether each document is one sequence, see `packing.pad_documents`.
  """

  def __init__(self, parts: packing.Parts, model: Path, seq_len: int, padded: bool = False):
    self.seq_len = seq_len
    self._parts, self._model, self._padded = parts, model, padded
    self._restart()

  def _restart(self):
    loaded = tokenizer.load_tokenizer(self._model)
    encoded = packing.encode_chunks(loaded, packing.read_chunks(self._parts))
    self._progress = packing.SplitProgress()
    pad = lambda tokens: self._progress.pad(tokens, self.seq_len, loaded.eos).reshape(-1)
    self._tokens = (pad(group.tokens) if self._padded else group.tokens for group in encoded)
    self._buffer, self._consumed = np.empty(0, np.int32), 0

  @property
  def cut_tokens(self) -> int:
    """Tokens that padding has cut off at the end of long documents, in the text read so far; 0 if not padded."""
    return self._progress.cut_tokens

  def rows(self, start: int, count: int, step: int) -> np.ndarray:
    """Sequences `start` to `start + count`, int32 [count, seq_len]. Earlier ones than before are read from the start.

    Args:
      step: the step that needs them, for the error message.

    Raises:
      UserError: the text ends before the last of them.
    """
    if not count:  # whatever `start` is: nothing is read again
      return np.empty((0, self.seq_len), np.int32)
    begin, size = start * self.seq_len, count * self.seq_len
    if begin < self._consumed:
      self._restart()
    while skipped := min(begin - self._consumed, size):  # in parts, to bound the memory
      self._take(skipped, step)
    return self._take(size, step).reshape(count, self.seq_len)

  def _take(self, count: int, step: int) -> np.ndarray:
    """The next `count` tokens. `step` appears in the error message."""
    parts, available = [self._buffer], len(self._buffer)
    while available < count:
      parts.append(self._next_tokens(step))
      available += len(parts[-1])
    tokens = np.concatenate(parts)
    self._consumed, self._buffer = self._consumed + count, tokens[count:]
    return tokens[:count]

  def _next_tokens(self, step: int) -> np.ndarray:
    tokens = next(self._tokens, None)
    if tokens is None:
      raise UserError(
        f"the text ended before step {step + 1}; a stream is not repeated: lower --config.steps, add text, or "
        "prepare it with experiments.prepare_data and set --config.data.epochs"
      )
    return tokens
