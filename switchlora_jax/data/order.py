"""The order in which an epoch takes its rows: computed where it is asked for, never kept as a list."""

import math

import numpy as np

ROUNDS = 8


def shuffled(places: np.ndarray, rows: int, *, seed: int, epoch: int) -> np.ndarray:
  """The rows that an epoch takes at `places`, integers in [0, rows), any shape; int64, another one for each place.

  A Feistel network over the pairs (left, right) of a grid of at least `rows` cells, entered again by
  what leaves [0, rows) (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002): a permutation
  of all rows that costs no memory, the same wherever and in whatever pieces it is asked for.
  """
  keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)
  picks = _scramble(np.array(places, np.uint64, ndmin=1), rows, keys)
  while (outside := picks >= rows).any():
    picks[outside] = _scramble(picks[outside], rows, keys)
  return picks.astype(np.int64).reshape(np.shape(places))


def _scramble(cells: np.ndarray, rows: int, keys: np.ndarray) -> np.ndarray:
  """A permutation of the cells of the smallest grid, about as wide as high, that has a cell for every row."""
  width = np.uint64(math.isqrt(max(rows - 1, 0)) + 1)
  height = np.uint64(-(-rows // int(width)))
  right, left = np.divmod(cells, width)
  for key, next_key in keys.reshape(-1, 2):
    left = (left + _mixed(right ^ key) % width) % width
    right = (right + _mixed(left ^ next_key) % height) % height
  return right * width + left


def _mixed(x: np.ndarray) -> np.ndarray:
  """uint64 -> uint64, every bit depending on all: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
