from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import packing_in, rows_of, sentences, tiny_config, write_lines

from switchlora_jax.data import dataset, tokenizer
from switchlora_jax.data.loader import SequenceStream, shuffled_batch, shuffled_indices
from switchlora_jax.errors import UserError

# The permutation of an epoch.

SIZES = st.integers(1, 3000)
SEEDS = st.integers(0, 2**32)


@settings(deadline=None)
@given(size=SIZES, seed=SEEDS, epoch=st.integers(0, 1000))
def test_shuffled_indices_are_a_permutation(size, seed, epoch):
  indices = shuffled_indices(np.arange(size), size, seed=seed, epoch=epoch)
  np.testing.assert_array_equal(np.sort(indices), np.arange(size))


@settings(deadline=None)
@given(size=SIZES, data=st.data())
def test_any_positions_can_be_evaluated_alone(size, data):
  whole = shuffled_indices(np.arange(size), size, seed=1, epoch=2)
  positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
  np.testing.assert_array_equal(shuffled_indices(np.array(positions), size, seed=1, epoch=2), whole[positions])
  assert shuffled_indices(positions[0], size, seed=1, epoch=2) == whole[positions[0]]


def test_every_seed_and_epoch_has_its_own_permutation():
  orders = {(s, e): tuple(shuffled_indices(np.arange(100), 100, seed=s, epoch=e)) for s in range(20) for e in range(20)}
  assert len(set(orders.values())) == 400 and tuple(range(100)) not in orders.values()


@pytest.mark.parametrize("size", [2, 3, 7, 10, 17])
def test_every_index_is_equally_likely_at_every_position(size):
  """Pearson's χ² of the (position, index) counts; its mean is the degrees of freedom, its variance twice that."""
  draws = 4000
  indices = np.stack([shuffled_indices(np.arange(size), size, seed=seed, epoch=0) for seed in range(draws)])
  counts = np.stack([np.bincount(indices[:, position], minlength=size) for position in range(size)])
  chi2, freedom = ((counts - draws / size) ** 2 / (draws / size)).sum(), (size - 1) ** 2
  assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom) + 5


def test_neighbouring_positions_are_independent():
  """The mean distance of consecutive indices is that of independent draws, a third of the size."""
  size = 100_000
  indices = shuffled_indices(np.arange(size), size, seed=0, epoch=0)
  assert abs(np.abs(np.diff(indices)).mean() / size - 1 / 3) < 0.005
  assert abs(np.corrcoef(np.arange(size), indices)[0, 1]) < 0.015  # five standard deviations


def test_a_permutation_larger_than_memory():
  size = 10**15
  indices = shuffled_indices(np.arange(0, size, size // 1000), size, seed=0, epoch=0)
  assert len(set(indices)) == len(indices) and indices.min() >= 0
  assert 0.9 * size < indices.max() < size


# Batches of sequences on disk.


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
  """Training sequences in several shards that also contain held-out sequences; and the same sequences as an array."""
  folder = tmp_path_factory.mktemp("rows")
  path = write_lines(folder / "a.jsonl", sentences(0, 100))
  with packing_in(200, 256):
    train = dataset.open_dataset(tiny_config(folder, steps=1, data__path=str(path)), progress=False).train
  assert len(train._shards) > 4 and len(train) % 7
  return train, np.asarray(train)


def read(sequences, step, size, seed=3, hosts=1):
  """The batch of a step, read in equal parts by a number of hosts."""
  share = size // hosts
  batch = lambda: shuffled_batch(sequences, seed=seed, step=step, batch_size=size)
  return np.concatenate([batch()[host * share : (host + 1) * share] for host in range(hosts)])


def test_every_epoch_contains_every_sequence_once_for_any_number_of_hosts(on_disk):
  train, array = on_disk
  steps, whole = range(-(-3 * len(train) // 28)), sorted(array.tolist())
  taken = [np.concatenate([read(train, step, 28, hosts=hosts) for step in steps]) for hosts in (1, 2, 4)]
  np.testing.assert_array_equal(taken[0], taken[1])
  np.testing.assert_array_equal(taken[0], taken[2])
  epochs = taken[0][: 3 * len(train)].reshape(3, len(train), 16)
  assert all(sorted(epoch.tolist()) == whole for epoch in epochs)
  assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], array)


def test_only_the_requested_slice_of_a_batch_is_read():
  class Recorder:
    shape = (10, 3)
    read = ()

    def __len__(self):
      return 10

    def __getitem__(self, indices):
      self.read = [*self.read, *indices.tolist()]
      return np.zeros((len(indices), 3), np.uint16)

  sequences = Recorder()
  batch = shuffled_batch(sequences, seed=0, step=1, batch_size=8)
  assert batch.shape == (8, 3) and not sequences.read
  assert batch[2:4].dtype == np.int32 and sequences.read == batch.indices[2:4].tolist()


@settings(deadline=None, max_examples=50)
@given(steps=st.lists(st.integers(0, 300), min_size=1), size=st.integers(1, 500), seed=st.integers(0, 9))
def test_a_batch_is_a_function_of_its_seed_and_step(on_disk, steps, size, seed):
  """Consecutive batches continue one sequence of indices, for any batch size."""
  train, array = on_disk
  for step in steps:
    positions = step * size + np.arange(size)
    indices = [permutation(len(array), p // len(array), seed)[p % len(array)] for p in positions]
    np.testing.assert_array_equal(read(train, step, size, seed), array[indices])


@cache
def permutation(size, epoch, seed):
  return shuffled_indices(np.arange(size), size, seed=seed, epoch=epoch)


def test_the_order_depends_on_the_seed(on_disk):
  train, _ = on_disk
  assert not np.array_equal(read(train, 2, 16), read(train, 2, 16, seed=4))


# Batches of a stream.

PARTS = [sentences(0, 30), [], ["", *sentences(30, 50)]]
BATCH, LENGTH = 4, 16


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "own.model"
  tokenizer.train_tokenizer(sentences(0, 50), 320, path)
  return path


@pytest.fixture(scope="module")
def expected(path):
  """All batches, [steps, BATCH, LENGTH]."""
  rows = rows_of(tokenizer.load_tokenizer(path), sentences(0, 50), LENGTH)
  return rows[: len(rows) // BATCH * BATCH].reshape(-1, BATCH, LENGTH)


@pytest.mark.parametrize("group", [80, 200, 1_000_000])
def test_a_stream_has_the_sequences_of_a_prepared_folder(path, expected, group):
  with packing_in(group):  # each document is one chunk
    stream = SequenceStream(PARTS, path, LENGTH)
    batches = np.stack([stream.rows(step * BATCH, BATCH, step) for step in range(len(expected))])
  np.testing.assert_array_equal(batches, expected)
  assert batches.dtype == np.int32 and len(expected) > 10


@settings(deadline=None, max_examples=20)
@given(steps=st.lists(st.integers(0, 10), max_size=6))
def test_steps_of_a_stream_can_be_requested_in_any_order(path, expected, steps):
  stream = SequenceStream(PARTS, path, LENGTH)
  for step in steps:
    np.testing.assert_array_equal(stream.rows(step * BATCH, BATCH, step), expected[step])


def test_skipped_steps_of_a_stream_are_not_kept_in_memory(path):
  with packing_in(200):
    stream, taken = SequenceStream([sentences(0, 50)] * 20, path, LENGTH), []
    take = stream._take
    stream._take = lambda count, step: taken.append(count) or take(count, step)
    stream.rows(200 * BATCH, BATCH, 200)
  assert len(taken) == 201 and max(taken) == BATCH * LENGTH and len(stream._buffer) < 1000


def test_the_end_of_a_stream_is_an_error(path, expected):
  stream = SequenceStream(PARTS, path, LENGTH)
  for step in (len(expected), 10_000):
    with pytest.raises(UserError, match=rf"the text ended before step {step + 1}; a stream is not repeated: lower"):
      stream.rows(step * BATCH, BATCH, step)
  last = len(expected) - 1
  np.testing.assert_array_equal(stream.rows(last * BATCH, BATCH, last), expected[last])
  np.testing.assert_array_equal(stream.rows(0, BATCH, 0), expected[0])


def test_a_stream_reads_its_text_on_demand(path):
  documents = iter(sentences(0, 10_000))
  with packing_in(200):
    SequenceStream([documents], path, LENGTH).rows(0, BATCH, 0)
  assert len(list(documents)) > 9_900
