import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlora_jax.data.tokenizer import load_tokenizer, train_tokenizer
from switchlora_jax.glue.examples import Examples, encode_examples, epoch_batches, padded_batch, padded_length
from switchlora_jax.glue.tasks import LabelledTexts

EOS = 1


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "own.model"
  train_tokenizer(["The tide rises, the tide falls.\n"] * 9, 300, path)
  return load_tokenizer(path)


def examples_of(lengths) -> Examples:
  """Examples of the given lengths. All tokens of example i and its label are i, counted from 1."""
  return Examples([np.full(n, i, np.int32) for i, n in enumerate(lengths, 1)], np.arange(1, len(lengths) + 1))


def test_every_sentence_ends_with_eos(processor):
  found = encode_examples(
    LabelledTexts([("The tide", "rises é"), ("falls",), ("",)], np.array([1, 0, 1])), processor, 100
  )
  expected = [
    [*processor.encode(["The tide"])[0], EOS, *processor.encode(["rises é"])[0], EOS],
    [*processor.encode(["falls"])[0], EOS],
  ]
  assert [row.tolist() for row in found.tokens] == [*expected, [EOS]]
  assert found.labels.tolist() == [1, 0, 1] and {row.dtype for row in found.tokens} == {np.dtype(np.int32)}


def test_a_prefix_precedes_the_sentences_and_counts_towards_the_length(processor):
  rows = LabelledTexts([("The tide", "rises"), ("falls " * 9,)], np.array([1, 0]))
  (pair, long), (plain, cut) = (
    encode_examples(rows, processor, size, prefix).tokens for size, prefix in ((12, (7,)), (11, ()))
  )
  assert pair.tolist() == [7, *plain] and long.tolist() == [7, *cut] and len(long) == 12 and long.dtype == np.int32


@given(first=st.integers(0, 12), second=st.integers(0, 12), seq_len=st.integers(4, 20))
def test_the_longer_sentence_is_truncated(processor, first, second, seq_len):
  texts = "a" * first, "b" * second
  a, b = (processor.encode([letter])[0][0] for letter in "ab")
  (row,) = encode_examples(LabelledTexts([texts], np.array([0])), processor, seq_len).tokens
  assert len(row) == min(seq_len, len(processor.encode([texts[0]])[0]) + len(processor.encode([texts[1]])[0]) + 2)
  kept = [int((row == piece).sum()) for piece in (a, b)]
  assert row[-1] == EOS and (row == EOS).sum() == 2 and sum(kept) == len(row) - 2
  cut = [full - left for full, left in zip((first, second), kept, strict=True)]
  assert min(cut) >= 0
  # A truncated sentence is at most one token shorter than the other one.
  assert all(kept[i] >= kept[1 - i] - 1 for i in (0, 1) if cut[i])


@given(st.integers(1, 5000))
def test_a_padded_length_is_close_to_the_length(length):
  assert length <= padded_length(length) < max(17, 1.5 * length) and padded_length(
    padded_length(length)
  ) == padded_length(length)


def test_padded_lengths_up_to_512():
  assert sorted({padded_length(n) for n in range(1, 513)}) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]


def test_a_batch_is_padded_to_its_longest_example():
  found = padded_batch(examples_of([3, 17, 40]), np.array([1, 0]), 4)
  assert found.tokens.shape == (4, 24) and found.tokens.dtype == np.int32
  assert found.tokens[0].tolist() == [2] * 17 + [0] * 7 and found.tokens[1].tolist() == [1] * 3 + [0] * 21
  assert not found.tokens[2:].any()
  assert found.last.tolist() == [16, 2, 0, 0] and found.labels.tolist() == [2, 1, 0, 0]
  assert found.weights.tolist() == [1, 1, 0, 0]


@given(count=st.integers(1, 50), size=st.integers(1, 20), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_an_epoch_contains_every_example_once(count, size, seed, epoch):
  found = list(epoch_batches(examples_of([2] * count), size, seed=seed, epoch=epoch))
  assert {rows.tokens.shape for rows in found} == {(size, 16)} and len(found) == -(-count // size)
  labels = np.concatenate([rows.labels[rows.weights > 0] for rows in found])
  assert sorted(labels) == list(range(1, count + 1))
  assert all((rows.tokens[:, 0] == rows.labels).all() for rows in found)


def test_every_seed_and_epoch_has_a_different_order():
  order = lambda seed, epoch: tuple(
    rows.labels[0] for rows in epoch_batches(examples_of([2] * 30), 1, seed=seed, epoch=epoch)
  )
  orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
  assert len(orders) == 9 and tuple(range(1, 31)) not in orders and order(1, 2) == order(1, 2)
