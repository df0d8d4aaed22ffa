import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import packing_in, rows_of, sentences

from switchlora_jax.data import stream, tokenizer
from switchlora_jax.data.corpus import Corpus
from switchlora_jax.data.stream import Stream
from switchlora_jax.errors import UserError

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
def test_the_rows_are_those_that_would_be_prepared(path, expected, group):
  with packing_in(group):  # each of the documents is a piece
    read = Stream(PARTS, path, LENGTH)
    batches = np.stack([read.batch(step, BATCH) for step in range(len(expected))])
  np.testing.assert_array_equal(batches, expected)
  assert batches.dtype == np.int32 and len(expected) > 10


@settings(deadline=None, max_examples=20)
@given(steps=st.lists(st.integers(0, 10), max_size=6))
def test_any_step_may_be_asked_for_again(path, expected, steps):
  read = Stream(PARTS, path, LENGTH)
  for step in steps:
    np.testing.assert_array_equal(read.batch(step, BATCH), expected[step])


def test_steps_before_the_first_one_are_not_held(path):
  with packing_in(200):
    read, held = Stream([sentences(0, 50)] * 20, path, LENGTH), []
    take = read._take
    read._take = lambda count, step: held.append(count) or take(count, step)
    read.batch(200, BATCH)
  assert len(held) == 201 and max(held) == BATCH * LENGTH and len(read._waiting) < 1000


def test_the_end_of_the_text_is_a_sentence(path, expected):
  read = Stream(PARTS, path, LENGTH)
  for step in (len(expected), 10_000):
    with pytest.raises(UserError, match=rf"the text ended before step {step + 1}; a stream is not repeated: lower"):
      read.batch(step, BATCH)
  last = len(expected) - 1
  np.testing.assert_array_equal(read.batch(last, BATCH), expected[last])
  np.testing.assert_array_equal(read.batch(0, BATCH), expected[0])


def test_text_is_read_as_it_is_wanted(path):
  read = iter(sentences(0, 10_000))
  with packing_in(200):
    Stream([read], path, LENGTH).batch(0, BATCH)
  assert len(list(read)) > 9_900


def test_the_text_that_validates_is_needed():
  assert stream.validation(Corpus(["train"], ["valid"])) == Corpus(["valid"], None)
  with pytest.raises(UserError, match=r"source=stream needs text to validate on; set .*eval_path, or .* hub"):
    stream.validation(Corpus(["train"], None))
