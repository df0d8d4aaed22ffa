import itertools
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import packing_in, padded_rows_of, rows_of, sentences

from switchlora_jax.data import packing, tokenizer
from switchlora_jax.data.packing import START, Position, SplitProgress
from switchlora_jax.data.readers import BadRow, RowOptions
from switchlora_jax.errors import UserError

TEXTS = st.text(st.sampled_from("ab\né😀"), max_size=40)
PARTS = st.lists(st.lists(TEXTS, max_size=5), max_size=4)
GROUPS = st.integers(1, 50)


class Bytes:
  """A tokenizer whose tokens are the bytes of the text, so that cutting the text does not change them."""

  eos = 1

  def encode(self, texts):
    return [[byte + 2 for byte in text.encode()] for text in texts]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "own.model"
  tokenizer.train_tokenizer(sentences(0, 100), 320, path)
  return tokenizer.load_tokenizer(path)


def documents_of(parts):
  return [text for part in parts for text in part]


# Chunks.


@given(parts=PARTS, group=GROUPS)
def test_chunks_concatenate_to_the_documents(parts, group):
  with packing_in(group):
    chunks = list(packing.read_chunks(parts))
  assert all(0 < len(chunk.text) <= group for chunk in chunks)
  assert sum(chunk.ends for chunk in chunks) == len([text for text in documents_of(parts) if text])
  joined = "".join(chunk.text + "§" * chunk.ends for chunk in chunks)
  assert joined == "".join(text + "§" for text in documents_of(parts) if text)


@given(parts=PARTS, group=GROUPS)
def test_reading_resumes_after_any_chunk(parts, group):
  with packing_in(group):
    chunks = list(packing.read_chunks(parts))
    for count, chunk in enumerate(chunks, 1):
      assert list(packing.read_chunks(parts, chunk.after)) == chunks[count:]


@given(parts=PARTS, group=GROUPS, piece=st.integers(1, 9))
def test_documents_in_pieces_give_the_same_chunks(parts, group, piece):
  """From the start, and from the position after any chunk."""
  pieces = [[[text[at : at + piece] for at in range(0, len(text), piece)] for text in part] for part in parts]
  with packing_in(group):
    chunks = list(packing.read_chunks(parts))
    for start in (START, *(chunk.after for chunk in chunks)):
      assert list(packing.read_chunks(pieces, start)) == list(packing.read_chunks(parts, start))


@given(parts=PARTS, group=GROUPS, bad=st.sets(st.integers(0, 12)))
def test_rows_without_text_are_counted_wherever_reading_resumes(parts, group, bad):
  row = BadRow("a.jsonl, line 1", "text", "null", "mend it", RowOptions())
  numbers = itertools.count()
  mixed = [[item for text in part for item in ([row, text] if next(numbers) in bad else [text])] for part in parts]
  total = sum(item is row for part in mixed for item in part)
  with packing_in(group):
    chunks = list(packing.read_chunks(mixed))
    assert [chunk[:2] for chunk in chunks if chunk.text] == [chunk[:2] for chunk in packing.read_chunks(parts)]
    assert sum(chunk.bad_rows for chunk in chunks) == total
    for count, chunk in enumerate(chunks, 1):
      assert list(packing.read_chunks(mixed, chunk.after)) == chunks[count:]


def test_long_documents_are_cut_after_a_newline(monkeypatch):
  monkeypatch.setattr(packing, "GROUP", 10)
  chunks = [chunk.text for chunk in packing.read_chunks([["one two\nthree four\nfive", "0123456789", "0123456789ab"]])]
  assert chunks == ["one two\n", "three four", "\nfive", "0123456789", "0123456789", "ab"]


def test_parts_before_the_position_are_not_read():
  def unread():
    raise AssertionError("was read")
    yield

  class Unread:
    def __iter__(self):
      return unread()

  (chunk,) = packing.read_chunks([Unread(), ["one", "two"]], Position(1, 1))
  assert chunk == ("two", True, Position(1, 2), 0)


@given(parts=PARTS, group=GROUPS, take=st.integers(-1, 8))
def test_first_documents_stops_after_the_requested_number(parts, group, take):
  with packing_in(group):
    joined = "".join(p.text + "§" * p.ends for p in packing.first_documents(packing.read_chunks(parts), take))
  assert joined == "".join(text + "§" for text in [text for text in documents_of(parts) if text][: max(0, take)])


# Tokens.


def test_every_document_ends_with_eos_and_empty_ones_are_skipped(model):
  documents = ["", *sentences(0, 5), "", "\n"]
  (group,) = packing.encode_chunks(model, packing.read_chunks([documents]))
  expected = [token for text in documents if text for token in [*model.encode([text])[0], model.eos]]
  assert group.tokens.tolist() == expected and group.tokens.dtype == np.int32
  assert group[1:] == (6, sum(map(len, documents)), len("".join(documents).encode()), Position(0, 8), 0)
  assert not list(packing.encode_chunks(model, packing.read_chunks([["", ""], []])))


@pytest.mark.parametrize("limit", [30, 60, 200])
def test_long_documents_are_encoded_in_chunks_without_loss(model, monkeypatch, limit):
  documents = ["The tide rises.\nThe waves break on the rocks.\n\n" * 5, "x" * 100, "\n" * 50, "é"]
  monkeypatch.setattr(packing, "GROUP", limit)
  groups = list(packing.encode_chunks(model, packing.read_chunks([documents])))
  tokens = np.concatenate([group.tokens for group in groups])
  assert model.decode(tokens[tokens != 1].tolist()) == "".join(documents) and (tokens == 1).sum() == 4
  assert sum(group.bytes for group in groups) == len("".join(documents).encode())
  assert sum(group.documents for group in groups) == 4 and max(group.characters for group in groups) < 2 * limit


def test_documents_are_read_lazily(model, monkeypatch):
  monkeypatch.setattr(packing, "GROUP", 20)
  documents = iter(["The tide rises."] * 100)
  next(packing.encode_chunks(model, packing.read_chunks([documents])))
  assert len(list(documents)) >= 95


def test_an_error_of_the_text_reader_propagates():
  def text():
    yield "a" * packing.GROUP
    raise UserError("no text")

  groups = packing.encode_chunks(Bytes(), packing.read_chunks([text()]))
  assert len(next(groups).tokens) == packing.GROUP + 1
  with pytest.raises(UserError, match="no text"):
    next(groups)


# Sequences.


class Killed(Exception):
  pass


def fill(folder, parts, saved, seq_len, dtype=np.uint16, kill=None, eos=None):
  """Packs from the last progress in `saved`, a list of JSON strings. Save number `kill`, from 0 on, raises Killed."""
  split = SplitProgress(**json.loads(saved[-1])) if saved else SplitProgress()
  split.position = Position(*split.position)
  count = itertools.count()

  def save():
    if next(count) == kill:
      raise Killed  # after the shard, before the progress
    saved.append(json.dumps(asdict(split)))

  encoded = packing.encode_chunks(Bytes(), packing.read_chunks(parts, split.position))
  packing.pack(split, encoded, folder, "train", seq_len=seq_len, dtype=dtype, save=save, eos=eos)
  return split


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(deadline=None, max_examples=40)
@given(
  parts=PARTS, group=GROUPS, shard=st.integers(1, 60), seq_len=st.integers(1, 20), kills=st.lists(st.integers(0, 3))
)
@example(parts=[["a" * 39, "b\n" * 20]], group=7, shard=8, seq_len=4, kills=[0, 1, 1])
def test_sequences_are_the_concatenated_documents_after_any_kills(parts, group, shard, seq_len, kills):
  expected = rows_of(Bytes(), documents_of(parts), seq_len)
  with packing_in(group, shard), tempfile.TemporaryDirectory() as once, tempfile.TemporaryDirectory() as again:
    if not len(expected):
      with pytest.raises(UserError, match=f"at least one row of {seq_len} tokens"):
        fill(Path(once), parts, [], seq_len)
      return
    whole, saved = fill(Path(once), parts, [], seq_len), []
    for kill in kills:
      try:
        fill(Path(again), parts, saved, seq_len, kill=kill)
        break
      except Killed:
        pass
    if not (saved and json.loads(saved[-1])["complete"]):
      fill(Path(again), parts, saved, seq_len)
    rows = [np.load(Path(once) / shard.file) for shard in whole.shards]
    assert contents(Path(once)) == contents(Path(again))
    assert json.loads(saved[-1]) == json.loads(json.dumps(asdict(whole)))
  np.testing.assert_array_equal(np.concatenate(rows), expected)
  each = max(1, shard // seq_len)
  assert [len(rows) for rows in rows[:-1]] == [each] * (len(rows) - 1) and 0 < len(rows[-1]) <= each
  text = "".join(documents_of(parts))
  assert (whole.rows, whole.characters, whole.bytes) == (len(expected), len(text), len(text.encode()))
  assert whole.tokens == whole.bytes + whole.documents


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_shards_have_the_requested_dtype(tmp_path, dtype):
  fill(tmp_path, [["é" * 20]], [], 4, dtype)
  assert np.load(tmp_path / "train-00000.npy").dtype == dtype


def test_text_shorter_than_a_sequence_is_a_user_error_and_saves_nothing(tmp_path):
  for parts in ([], [["", ""]], [["abc"]]):
    saved = []
    with pytest.raises(
      UserError, match=r"train must hold at least one row of 5 tokens; it has \d tokens in \d non-empty"
    ):
      fill(tmp_path, parts, saved, 5)
    assert not saved and not contents(tmp_path)
  assert fill(tmp_path, [["abcd"]], [], 5).rows == 1


# Padding.


def test_documents_are_cut_or_padded_with_their_eos():
  """Documents of 0, 1, 3, 4 and 6 tokens, and one that has not ended, in rows of 4."""
  tokens = np.array([1, 5, 1, 6, 7, 8, 1, 9, 9, 9, 9, 1, 2, 3, 4, 5, 6, 7, 1, 8, 8, 8, 8, 8], np.int32)
  rows, unfinished, cut = packing.pad_documents(tokens, 4, eos=1)
  assert rows.tolist() == [[1, -1, -1, -1], [5, 1, -1, -1], [6, 7, 8, 1], [9, 9, 9, 1], [2, 3, 4, 1]]
  assert unfinished.tolist() == [8, 8, 8] and cut == 1 + 3 + 2 and rows.dtype == np.int32


@pytest.mark.parametrize("pieces", [65_535, 65_536])
def test_padding_is_not_the_id_of_a_token(pieces):
  """uint16 holds 65,536 ids: all of such a vocabulary, or one less and padding."""
  dtype = packing.row_dtype(pieces, "pad")
  assert np.array(-1).astype(dtype) not in np.arange(pieces).astype(dtype)
  assert packing.row_dtype(pieces, "pack") == np.uint16 != packing.row_dtype(1 << 17, "pack")


@settings(deadline=None, max_examples=40)
@given(
  parts=PARTS, group=GROUPS, shard=st.integers(1, 60), seq_len=st.integers(2, 20), kills=st.lists(st.integers(0, 3))
)
@example(parts=[["a" * 39, "", "b\n" * 20, "ab"]], group=7, shard=8, seq_len=4, kills=[0, 1, 1])
def test_padded_rows_are_the_documents_one_by_one_after_any_kills(parts, group, shard, seq_len, kills):
  """Also of documents that are tokenized in several groups, between which the process is killed."""
  expected, options = padded_rows_of(Bytes(), documents_of(parts), seq_len), dict(eos=1)
  with packing_in(group, shard), tempfile.TemporaryDirectory() as once, tempfile.TemporaryDirectory() as again:
    if not len(expected):
      with pytest.raises(UserError, match=f"at least one row of {seq_len} tokens"):
        fill(Path(once), parts, [], seq_len, **options)
      return
    whole, saved = fill(Path(once), parts, [], seq_len, **options), []
    for kill in kills:
      try:
        fill(Path(again), parts, saved, seq_len, kill=kill, **options)
        break
      except Killed:
        pass
    if not (saved and json.loads(saved[-1])["complete"]):
      fill(Path(again), parts, saved, seq_len, **options)
    rows = np.concatenate([np.load(Path(once) / shard.file) for shard in whole.shards])
    assert contents(Path(once)) == contents(Path(again))
    assert json.loads(saved[-1]) == json.loads(json.dumps(asdict(whole)))
  np.testing.assert_array_equal(rows, expected.astype(np.uint16))
  assert whole.rows == whole.documents == len(expected)
  assert whole.tokens - whole.cut_tokens == (expected >= 0).sum() and whole.unfinished == []


def test_the_start_is_the_first_character():
  assert START == (0, 0, 0) and SplitProgress().position == START
