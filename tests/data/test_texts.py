"""Further texts of a run: what their settings may be, and which rows they give."""

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from tiny import rows_of, sentences, tiny_config, write_lines, write_text

from switchlora_jax.data import corpus, dataset, preparation, texts, tokenizer
from switchlora_jax.data.mixture import Mixture
from switchlora_jax.errors import UserError

OLD, HELD_OUT = sentences(0, 60), sentences(60, 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """With two texts of files, and the text and the cache of the runs."""
  folder = tmp_path_factory.mktemp("texts")
  write_lines(folder / "old" / "a.jsonl", OLD)
  write_lines(folder / "held_out" / "a.jsonl", HELD_OUT)
  shutil.copy(write_text(folder), folder / "own.txt")
  return folder


def config_of(folder, **changes):
  """A run on `own.txt`, which is not written again: the name of its cache folder depends on its modification time."""
  return tiny_config(folder, **dict(data__path=str(folder / "own.txt")) | changes)


@pytest.fixture
def config(folder):
  """A run on the text with the two others."""
  return config_of(folder, data__mixture=f"0.1={folder}/old/*", data__eval_also=f"old={folder}/held_out/*")


@pytest.fixture(scope="module")
def plain(folder):
  """The dataset without further texts."""
  return dataset.open_dataset(config_of(folder), progress=False)


def prepared(folder: Path, model: str, seq_len: int = 16, texts_of=OLD) -> Path:
  """A prepared folder with training text and the validation text of the files."""
  text = lambda: corpus.Corpus([texts_of], [HELD_OUT])
  where = folder / f"prepared-{Path(model).name}-{seq_len}-{len(texts_of)}"
  preparation.fill_folder(where, preparation.Request(["text"], model, seq_len), text, wait=True, progress=False)
  return where


def test_files_are_packed_with_the_tokenizer_of_the_run(folder, config, plain):
  made = dataset.open_dataset(config, progress=False)
  model = tokenizer.load_tokenizer(made.tokenizer_path)
  assert made.tokenizer_path == plain.tokenizer_path and isinstance(made.train, Mixture)
  np.testing.assert_array_equal(made.train.main, plain.train)
  np.testing.assert_array_equal(made.train.others[0], rows_of(model, OLD, 16))
  (also,) = made.also
  np.testing.assert_array_equal(also.rows, rows_of(model, HELD_OUT, 16))
  tokens = sum(len(model.encode([text])[0]) + 1 for text in HELD_OUT)
  assert also.label == "old" and also.bytes_per_token == sum(len(text.encode()) for text in HELD_OUT) / tokens
  assert made.train.shares == (Fraction(1, 10),)
  printed = made.summary["further"]
  assert list(printed) == [f"mixture {folder}/old/*", "valid old"]
  added, held_out = printed.values()
  assert (added["share"], added["documents"], added["rows"]) == ("0.1 of all rows", len(OLD), len(made.train.others[0]))
  assert (held_out["documents"], held_out["tokens"], held_out["rows"]) == (len(HELD_OUT), tokens, len(also.rows))


def test_a_prepared_folder_has_training_and_validation_rows(folder, plain):
  where = prepared(folder, plain.tokenizer_path)
  changes = dict(data__mixture=f"0.25={where}", data__eval_also=f"old = {where};")
  made = dataset.open_dataset(config_of(folder, **changes), progress=False)
  model = tokenizer.load_tokenizer(made.tokenizer_path)
  np.testing.assert_array_equal(made.train.others[0], rows_of(model, OLD, 16))
  np.testing.assert_array_equal(made.also[0].rows, rows_of(model, HELD_OUT, 16))


def test_the_documentation_has_the_folder_of_a_run_on_it(folder, plain, monkeypatch):
  """Its training rows are mixed in, its validation rows are evaluated; both splits are packed once."""
  monkeypatch.setattr(texts.documentation, "read_corpus", lambda _: corpus.Corpus([OLD], [HELD_OUT]))
  monkeypatch.setattr(dataset.documentation, "origin", lambda: [["a", "1"]])
  tokens = plain.tokenizer_path
  cache = str(folder / "docs_cache")
  changes = dict(data__tokenizer=tokens, data__mixture="0.5=docs", data__eval_also="docs=docs", data__cache_dir=cache)
  made = dataset.open_dataset(config_of(folder, **changes), progress=False)
  model = tokenizer.load_tokenizer(tokens)
  np.testing.assert_array_equal(made.train.others[0], rows_of(model, OLD, 16))
  np.testing.assert_array_equal(made.also[0].rows, rows_of(model, HELD_OUT, 16))
  docs = config_of(folder, data__source="docs", data__path="", data__tokenizer=tokens, data__cache_dir=cache)
  assert dataset.open_dataset(docs, progress=False).fingerprint == made.also[0].fingerprint
  assert len(list(Path(cache).glob("docs-*"))) == 1


def test_the_fingerprint_depends_on_the_mixture_but_not_on_further_validation(folder, config, plain):
  found = {plain.fingerprint}
  for mixture in ("0.1", "0.2"):
    config.data.mixture = f"{mixture}={folder}/old/*"
    found.add(dataset.open_dataset(config, progress=False).fingerprint)
  config.data.mixture = f"0.1={folder}/held_out/*"
  config.data.eval_also = ""
  found.add(dataset.open_dataset(config, progress=False).fingerprint)
  assert len(found) == 4
  config.data.mixture, config.data.eval_also = "", f"old={folder}/held_out/*"
  assert dataset.open_dataset(config, progress=False).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
  ("mixture", "sentence"),
  [
    ("old/*", r"mixture \(='old/\*'\) must list entries SHARE=TEXT, .*; found 'old/\*'"),
    ("0.1=", r"must list entries SHARE=TEXT"),
    ("x=old", r"the share of 'old' must be a number between 0 and 1 .*; found 'x'; write e\.g\. 0\.1=old"),
    ("0=old", r"the share of 'old' must be a number between 0 and 1"),
    ("1/0=old", r"the share of 'old' must be a number between 0 and 1"),
    ("0.12345=old", r"with at most four decimals; found '0\.12345'"),
    ("0.1=a; 0.2=a", r"must have different texts; found 'a' twice; add up its shares"),
    ("1e-3000000=old", r"found '1e-3000000'"),
    ("0.6=a;0.4=b", r"the shares must add up to less than 1, .*; found 1; lower them"),
  ],
)
def test_a_wrong_mixture_is_an_error(mixture, sentence):
  with pytest.raises(UserError, match=sentence):
    texts.parse_mixture(mixture)


@pytest.mark.parametrize(
  ("also", "sentence"),
  [
    ("old", r"eval_also \(='old'\) must list entries NAME=TEXT"),
    ("a b=old", r"names must consist of letters, digits, .*; found 'a b'; choose"),
    ("a/b=old", r"found 'a/b'"),
    ("a=x;a=y", r"must have different names; found 'a' twice; rename one"),
  ],
)
def test_wrong_names_of_validation_texts_are_an_error(also, sentence):
  with pytest.raises(UserError, match=sentence):
    texts.parse_eval_also(also)


def test_texts_that_do_not_fit_are_refused_before_any_work(folder, config, plain, monkeypatch):
  monkeypatch.setattr(preparation, "fill_folder", lambda *_, **__: pytest.fail("work before the check"))
  other = folder / "other.model"
  tokenizer.train_tokenizer(sentences(0, 90), 310, other)
  config.data.tokenizer = plain.tokenizer_path
  for mixture, sentence in {
    f"0.1={folder}/nowhere/*": r"mixture=0\.1 \(='.*nowhere/\*'\) must match .*: --config\.data\.mixture=0\.1='c4/",
    f"0.1={folder}/old": r"must be a glob of files or a folder written by .*=0\.1='.*/old/\*', or complete",
    f"0.1={folder}/held_out/*": r"must not share files; .*a\.jsonl is in both",
  }.items():
    config.data.mixture = mixture
    with pytest.raises(UserError, match=sentence):
      dataset.check_data_config(config)
  monkeypatch.undo()
  config.data.update(mixture="", eval_also=f"own={folder}/own.tx*")
  with pytest.raises(UserError, match=r"must not share files; .*own\.txt is in both \(shared files: 1\); narrow"):
    dataset.check_data_config(config)
  for where, sentence in {
    prepared(folder, str(other)): r"eval_also=old \(='.*'\) must be prepared with the tokenizer of the run, but has",
    prepared(folder, plain.tokenizer_path, 8): r"must have rows of 16 tokens like the run; it has rows of 8",
  }.items():
    config.data.eval_also = f"old={where}"
    with pytest.raises(UserError, match=sentence):
      dataset.check_data_config(config)
  config.data.update(tokenizer="", eval_also=f"old={prepared(folder, str(other))}")
  with pytest.raises(UserError, match="must be prepared with the tokenizer of the run, but has another"):
    dataset.check_data_config(config)  # it was trained for `plain`
  config.data.eval_also = f"old={prepared(folder, plain.tokenizer_path)}"
  dataset.check_data_config(config)


def test_rows_that_are_held_out_are_not_trained_on(folder, config):
  """Without a validation text, the last rows of data.path are held out; the mixture takes all rows of a file."""
  config.data.mixture = f"0.1={folder}/own.tx*"
  with pytest.raises(UserError, match=r"mixture has '.*own\.txt', which is in data\.path as well, .* set --config"):
    dataset.check_data_config(config)
  config.data.update(eval_path=f"{folder}/held_out/*", eval_also="")
  dataset.check_data_config(config)


def test_the_validation_split_of_a_hub_dataset_is_checked_first(config, monkeypatch):
  monkeypatch.setattr(corpus, "_hub", lambda *_: corpus.Corpus([OLD], None))
  config.data.eval_also = "old=hub:some/text"
  with pytest.raises(UserError, match=r"eval_also=old \(='hub:some/text'\) must have a split `validation`"):
    dataset.check_data_config(config)


def test_missing_documentation_is_found_first(config, monkeypatch):
  def missing():
    raise UserError("packages are missing")

  monkeypatch.setattr(texts.documentation, "origin", missing)
  config.data.mixture = "0.1=docs"
  with pytest.raises(UserError, match=r"mixture=0\.1 \(='docs'\): packages are missing"):
    dataset.check_data_config(config)


def test_further_validation_texts_need_not_exist_for_other_uses(folder, config):
  config.data.eval_also = "old=nowhere/*"
  assert dataset.open_dataset(config, progress=False, also=False).also == ()
  with pytest.raises(UserError, match="eval_also=old"):
    dataset.open_dataset(config, progress=False)


def test_a_mixture_is_not_repeated_unless_allowed(folder, config, plain, monkeypatch):
  """12 steps of 8 rows: the mixture of a half needs 48 of its rows, the text of the run the other 48."""
  write_lines(folder / "short" / "a.jsonl", OLD[:10])
  config.data.mixture = f"0.5={folder}/short/*"
  sentence = r"needs 48 rows \(12 steps of 8\); the text '.*' of data\.mixture .*epochs=2"
  with pytest.raises(UserError, match=sentence):
    dataset.open_dataset(config, progress=False)
  short = prepared(folder, plain.tokenizer_path, texts_of=OLD[:10])
  with monkeypatch.context() as patch, pytest.raises(UserError, match=sentence):
    patch.setattr(preparation, "fill_folder", lambda *_, **__: pytest.fail("work before the check"))
    dataset.check_data_config(config_of(folder, data__mixture=f"0.5={short}"))
  config.data.epochs = 5
  made = dataset.open_dataset(config, progress=False)
  assert 48 / 5 <= len(made.train.others[0]) < 48
  dataset.check_length_after_skips(made, config, 0)
  with pytest.raises(UserError, match=r"skips 1,000 batches .* repeat it once more"):
    dataset.check_length_after_skips(made, config, 1000)


def test_a_text_without_a_row_is_an_error(folder, config, plain):
  write_lines(folder / "empty" / "a.jsonl", ["a"])
  config.data.eval_also = f"old={folder}/empty/*"
  with pytest.raises(UserError, match=r"eval_also=old \(='.*'\): the text of .* must hold at least one row"):
    dataset.open_dataset(config, progress=False)
  request = preparation.Request(["row"], plain.tokenizer_path, 16)
  text = lambda: corpus.Corpus([["The tide rises and falls."]], None)
  preparation.fill_folder(folder / "row", request, text, wait=True, progress=False)
  config.data.update(mixture=f"0.1={folder}/row", eval_also="")
  with pytest.raises(UserError, match=r"mixture=0\.1 \(='.*/row'\) must hold at least one row of 16 tokens; add text"):
    dataset.open_dataset(config, progress=False)  # its only rows are held out


def test_the_field_of_files_is_used_beside_a_text_without_one(folder, config):
  config.data.field = "content"
  with pytest.raises(UserError, match="content"):
    dataset.open_dataset(config, progress=False)
