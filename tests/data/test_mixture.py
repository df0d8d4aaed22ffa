"""Mixtures: every text has its share, in its own order, and any batch can be made alone."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import sentences

from switchlora_jax.data import loader, tokenizer
from switchlora_jax.data.mixture import PARTS, JoinedSequences, Mixture, locate, row_counts

LENGTH, BATCH = 4, 8
TENTH, FIFTH = Fraction(1, 10), Fraction(1, 5)


@st.composite
def shares(draw):
  """Shares of up to four texts, whose sum is less than 1."""
  parts = draw(st.lists(st.integers(1, PARTS // 4 - 1), min_size=1, max_size=4))
  return tuple(Fraction(part, PARTS) for part in parts)


@settings(deadline=None)
@given(found=shares(), rows=st.integers(0, 300))
def test_every_text_has_its_share_and_its_rows_without_a_gap(found, rows):
  texts, positions = locate(np.arange(rows), found)
  counts = [int((texts == text).sum()) for text in range(len(found) + 1)]
  assert counts == row_counts(rows, found)
  for count, share in zip(counts[1:], found, strict=True):
    assert abs(count - rows * share) < len(found) + 1
  for text, count in enumerate(counts):
    np.testing.assert_array_equal(positions[texts == text], np.arange(count))


@settings(deadline=None)
@given(found=shares(), start=st.integers(0, 10**11), rows=st.integers(1, 50))
def test_any_rows_can_be_located_alone(found, start, rows):
  texts, positions = locate(start + np.arange(rows), found)
  before = row_counts(start, found)
  for text, count in enumerate(row_counts(start + rows, found)):
    np.testing.assert_array_equal(positions[texts == text], np.arange(before[text], count))


def numbered(first: int, rows: int) -> np.ndarray:
  """Sequences that consist of their own number."""
  return np.repeat(np.arange(first, first + rows)[:, None], LENGTH, axis=1)


def test_each_text_is_read_in_the_order_of_a_run_on_it_alone():
  texts = numbered(0, 50), numbered(100, 7), numbered(200, 30)
  mixture, steps = Mixture(texts[0], texts[1:], (TENTH, FIFTH)), 25
  make = lambda step: loader.mixed_batch(mixture, seed=3, step=step, batch_size=BATCH)
  rows = np.concatenate([make(step)[:] for step in range(steps)])
  assert rows.dtype == np.int32 and rows.shape == (steps * BATCH, LENGTH)
  np.testing.assert_array_equal(rows, rows[:, :1].repeat(LENGTH, axis=1))
  for text, count in zip(texts, row_counts(steps * BATCH, mixture.shares), strict=True):
    alone = loader.shuffled_batch(text, seed=3, step=0, batch_size=count)[:]
    np.testing.assert_array_equal(rows[(rows[:, 0] // 100) == text[0, 0] // 100], alone)
  assert [round(steps * BATCH * share) for share in (TENTH, FIFTH)] == [20, 40], "20 rows are several epochs of 7"


def test_a_part_of_a_batch_is_read_alone():
  mixture = Mixture(numbered(0, 50), (numbered(100, 7),), (FIFTH,))
  batch = loader.mixed_batch(mixture, seed=0, step=4, batch_size=BATCH)
  np.testing.assert_array_equal(batch[2:5], batch[:][2:5])
  assert batch.shape == (BATCH, LENGTH)


def test_without_other_texts_nothing_changes():
  text = numbered(0, 50)
  mixed = loader.mixed_batch(Mixture(text, (), ()), seed=1, step=9, batch_size=BATCH)
  np.testing.assert_array_equal(mixed[:], loader.shuffled_batch(text, seed=1, step=9, batch_size=BATCH)[:])


def test_the_rows_of_a_stream_keep_their_order(tmp_path):
  documents = sentences(0, 40)
  tokenizer.train_tokenizer(documents, 300, tmp_path / "tokenizer.model")
  stream = loader.SequenceStream([documents], tmp_path / "tokenizer.model", LENGTH)
  mixture, others = Mixture(stream, (numbered(1000, 9),), (FIFTH,)), []
  for step in (0, 1, 5, 2):  # a run that continues reads the stream again
    rows = loader.mixed_batch(mixture, seed=0, step=step, batch_size=BATCH)[:]
    own = row_counts((step + 1) * BATCH, (FIFTH,))[0]
    read = loader.SequenceStream([documents], tmp_path / "tokenizer.model", LENGTH).rows(0, own, 0)
    main = rows[rows[:, 0] < 1000]
    np.testing.assert_array_equal(main, read[len(read) - len(main) :])
    others.append(BATCH - len(main))
  assert sorted(set(others)) == [1, 2] and mixture.cut_tokens == 0


def test_a_batch_without_rows_of_the_stream_reads_nothing_again(tmp_path):
  """Two rows a batch, of which the stream has less than one."""
  documents = sentences(0, 40)
  tokenizer.train_tokenizer(documents, 300, tmp_path / "tokenizer.model")
  stream, restarts = loader.SequenceStream([documents], tmp_path / "tokenizer.model", LENGTH), []
  restart = stream._restart
  stream._restart = lambda: restarts.append(1) or restart()
  mixture = Mixture(stream, (numbered(1000, 9),), (Fraction(4, 5),))
  rows = [loader.mixed_batch(mixture, seed=0, step=step, batch_size=2)[:] for step in range(10)]
  assert not restarts and any((batch >= 1000).all() for batch in rows)


def test_joined_sequences():
  joined = JoinedSequences((numbered(0, 3), numbered(10, 2)))
  assert joined.shape == (5, LENGTH)
  np.testing.assert_array_equal(joined[np.array([4, 0, 2, 3])][:, 0], [11, 0, 2, 10])


@pytest.mark.parametrize("share", [TENTH, Fraction(9999, 10_000)])
def test_a_long_run_does_not_overflow(share):
  start = 10**14
  texts, positions = locate(start + np.arange(100), (share,))
  assert (positions >= 0).all() and set(texts) <= {0, 1} and sum(row_counts(start, (share,))) == start
