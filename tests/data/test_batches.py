from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import packing_in, sentences, tiny_config, write_lines

from switchlora_jax.data import dataset
from switchlora_jax.data.batches import batch
from switchlora_jax.data.order import shuffled


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
  """Rows of several shards, held out at the end, and the same as an array."""
  folder = tmp_path_factory.mktemp("rows")
  path = write_lines(folder / "a.jsonl", sentences(0, 100))
  with packing_in(200, 256):
    train = dataset.prepare(tiny_config(folder, steps=1, data__path=str(path)), progress=False).train
  assert len(train._shards) > 4 and len(train) % 7
  return train, np.asarray(train)


def read(rows, step, size, seed=3, hosts=1):
  """The batch of a step, of which each host reads its part."""
  each = size // hosts
  parts = [batch(rows, seed=seed, step=step, batch_size=size)[n * each : (n + 1) * each] for n in range(hosts)]
  return np.concatenate(parts)


def test_every_epoch_takes_every_row_once_whatever_the_hosts(on_disk):
  train, array = on_disk
  steps, whole = range(-(-3 * len(train) // 28)), sorted(array.tolist())
  taken = [np.concatenate([read(train, step, 28, hosts=hosts) for step in steps]) for hosts in (1, 2, 4)]
  np.testing.assert_array_equal(taken[0], taken[1])
  np.testing.assert_array_equal(taken[0], taken[2])
  epochs = taken[0][: 3 * len(train)].reshape(3, len(train), 16)
  assert all(sorted(epoch.tolist()) == whole for epoch in epochs)
  assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], array)


def test_a_host_reads_its_part_and_no_more():
  class Watched:
    shape = (10, 3)
    read = ()

    def __len__(self):
      return 10

    def __getitem__(self, picks):
      self.read = [*self.read, *picks.tolist()]
      return np.zeros((len(picks), 3), np.uint16)

  rows = Watched()
  found = batch(rows, seed=0, step=1, batch_size=8)
  assert found.shape == (8, 3) and not rows.read
  assert found[2:4].dtype == np.int32 and rows.read == found.picks[2:4].tolist()


@settings(deadline=None, max_examples=50)
@given(steps=st.lists(st.integers(0, 300), min_size=1), size=st.integers(1, 500), seed=st.integers(0, 9))
def test_a_batch_is_a_function_of_its_seed_and_step(on_disk, steps, size, seed):
  """And all are one sequence, whatever their size."""
  train, array = on_disk
  for step in steps:
    places = step * size + np.arange(size)
    picks = [in_epoch(len(array), place // len(array), seed)[place % len(array)] for place in places]
    np.testing.assert_array_equal(read(train, step, size, seed), array[picks])


@cache
def in_epoch(count, epoch, seed):
  return shuffled(np.arange(count), count, seed=seed, epoch=epoch)


def test_the_order_depends_on_the_seed(on_disk):
  train, _ = on_disk
  assert not np.array_equal(read(train, 2, 16), read(train, 2, 16, seed=4))
