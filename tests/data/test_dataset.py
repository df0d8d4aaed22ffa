import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from paths import GOLDEN
from tiny import packing_in, padded_rows_of, rows_of, sentences, tiny_config, write_lines

from switchlora_jax.data import corpus, dataset, documentation, folders, loader, preparation, shards, tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.training import report

TRAIN, VALID = sentences(0, 100), sentences(100, 120)


@pytest.fixture
def config(tmp_path):
  """100 training and 20 validation documents; 4 steps of 4 sequences."""
  path, valid = write_lines(tmp_path / "train" / "a.jsonl", TRAIN), write_lines(tmp_path / "valid" / "a.jsonl", VALID)
  return tiny_config(tmp_path, steps=4, batch_size=4, data__path=str(path), data__eval_path=str(valid))


@pytest.fixture
def forbid_expensive_work(monkeypatch):
  """Makes preparation, reading the documentation and verifying checksums raise."""

  def refuse(*args, **kwargs):
    raise AssertionError("expensive work started")

  for module, name in (
    (preparation._Preparation, "run"),
    (documentation, "read_documentation"),
    (shards, "verify_checksums"),
  ):
    monkeypatch.setattr(module, name, refuse)


def open_dataset(config):
  return dataset.open_dataset(config, progress=False)


def use_prepared_folder(config, folder):
  """Moves the sequences of `config` to a folder, as experiments.prepare_data does, and sets `config` to read it."""
  made = open_dataset(config)
  Path(made.tokenizer_path).parent.rename(folder)
  config.data.update(source="prepared", path=str(folder), eval_path="", tokenizer="")
  return made


# Packed sequences.


def test_sequences_are_the_concatenated_documents(config):
  made = open_dataset(config)
  model = tokenizer.load_tokenizer(made.tokenizer_path)
  for found, documents, name in ((made.train, TRAIN, "train"), (made.valid, VALID, "valid")):
    np.testing.assert_array_equal(found, rows_of(model, documents, 16))
    tokens, size = sum(len(model.encode([text])[0]) + 1 for text in documents), sum(map(len, documents))
    counts = {"documents": len(documents), "characters": size, "bytes": size, "tokens": tokens, "rows": len(found)}
    assert made.summary[name] == counts
  assert made.bytes_per_token == size / tokens
  assert made.summary["fingerprint"] == made.fingerprint and made.summary["source"] == "text"


def test_the_docs_source_holds_the_documentation_of_packages(config, monkeypatch):
  monkeypatch.setattr(documentation, "PACKAGES", ("flax",))
  config.data.update(source="docs", path="", eval_path="")
  config.model.vocab_size = 1024
  made, text = open_dataset(config), documentation.read_documentation()
  assert made.summary["train"]["documents"] == len(text.train) > 50
  assert open_dataset(config).fingerprint == made.fingerprint, "differs on the second read"
  assert made.summary["overlap"] == documentation.ngram_overlap(*text) < 0.05
  model = tokenizer.load_tokenizer(made.tokenizer_path)
  assert text.valid[0].startswith(model.decode(made.valid[0].tolist())[:30])


def test_without_validation_files_the_last_sequences_are_held_out(config, tmp_path):
  config.data.path = str(write_lines(tmp_path / "more" / "a.jsonl", sentences(0, 200)))
  both = open_dataset(config)
  config.data.eval_path = ""
  made = open_dataset(config)
  held = len(both.train) // 100
  assert held >= 2 and len(made.valid) == made.summary["valid"]["rows"] == held
  np.testing.assert_array_equal(np.concatenate([made.train, made.valid]), both.train)
  assert made.bytes_per_token == both.summary["train"]["bytes"] / both.summary["train"]["tokens"]
  config.seq_len, config.batch_size = 256, 2
  few = open_dataset(config)
  assert len(few.valid) == 1 and len(few.train) < 99 and few.summary["train"]["rows"] == len(few.train)


def test_a_given_tokenizer_is_used_and_copied(config, tmp_path, monkeypatch):
  given = tmp_path / "given.model"
  tokenizer.train_tokenizer(sentences(500, 600), 300, given)
  own = open_dataset(config)
  monkeypatch.setenv("HOME", str(tmp_path))
  config.data.tokenizer = "~/given.model"
  made = open_dataset(config)
  kept = given.read_bytes()
  given.unlink()
  assert Path(made.tokenizer_path).read_bytes() == kept != Path(own.tokenizer_path).read_bytes()
  assert made.fingerprint != own.fingerprint
  np.testing.assert_array_equal(made.train, rows_of(tokenizer.load_tokenizer(made.tokenizer_path), TRAIN, 16))


# Padding.


def padded(config):
  """`config` with padding, whose documents of 21 tokens or more are cut to 16, and some short ones."""
  config.data.packing = "pad"
  for path, documents in ((config.data.path, TRAIN), (config.data.eval_path, VALID)):
    write_lines(Path(path), ["", "A tide.", *documents, "W"])
  return config


def test_each_document_is_a_row_if_rows_are_padded(config):
  """Of the text, and of the same text streamed. The counts of padding and of tokens cut off are printed."""
  made = open_dataset(padded(config))
  model = tokenizer.load_tokenizer(made.tokenizer_path)
  for found, documents, name in ((made.train, TRAIN, "train"), (made.valid, VALID, "valid")):
    documents = ["A tide.", *documents, "W"]
    expected = padded_rows_of(model, documents, 16)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found[3], expected[3])
    np.testing.assert_array_equal(found[1:][np.array([1, 0])], expected[[2, 1]])
    assert found.dtype == found[1:].dtype == found[1:3][0].dtype == np.int32
    tokens, kept = sum(len(model.encode([text])[0]) + 1 for text in documents), int((expected >= 0).sum())
    assert kept < tokens and 0 < (expected < 0).mean() < 1
    counts = {"tokens": tokens, "tokens cut off": tokens - kept, "tokens in rows": kept, "rows": len(documents)}
    counts["padding"] = f"{(expected < 0).mean():.1%} of the rows"
    assert made.summary[name].items() >= counts.items() and "cut_tokens" not in made.summary[name]
    said = report.describe_data(made.summary)
    assert f"{tokens - kept:,} tokens cut off, {kept:,} tokens in rows, padding {counts['padding']}" in said
  config.data.update(source="stream", tokenizer=made.tokenizer_path)
  stream = open_dataset(config)
  np.testing.assert_array_equal(stream.train.rows(12, 4, 3), padded_rows_of(model, ["A tide.", *TRAIN], 16)[12:16])
  np.testing.assert_array_equal(stream.train.rows(0, 102, 0), made.train)
  assert stream.train.cut_tokens == made.summary["train"]["tokens cut off"]
  np.testing.assert_array_equal(stream.valid, made.valid)


def test_without_validation_files_the_last_documents_are_held_out(config):
  both = open_dataset(padded(config))
  config.data.eval_path = ""
  made = open_dataset(config)
  assert len(made.valid) == 1 and len(made.train) == 101
  np.testing.assert_array_equal(np.concatenate([made.train, made.valid]), both.train)
  assert "tokens" not in made.summary["valid"], "counting them would read the rows"


def test_bytes_per_token_are_those_of_the_rows_if_all_text_is_alike(config, tmp_path):
  """Every token but EOS is one byte. Of 40 bytes, rows hold 15 and EOS, or 3 and EOS."""
  config.data.update(packing="pad", eval_path="")
  config.data.path = str(write_lines(tmp_path / "alike" / "a.jsonl", [*["0123456789" * 4] * 30, *["012"] * 30]))
  made = open_dataset(config)
  assert (len(made.train) + len(made.valid), made.summary["train"]["tokens cut off"]) == (60, 30 * 25)
  assert made.bytes_per_token == pytest.approx(30 * (15 + 3) / (30 * (16 + 4)), rel=1e-12)


def test_padded_and_packed_rows_are_other_data(config, tmp_path):
  """The cache keeps both, a prepared folder records which it holds, and a run on the other one is refused."""
  packed = open_dataset(config)
  config.data.packing = "pad"
  made = open_dataset(config)
  assert made.fingerprint != packed.fingerprint and made.tokenizer_path != packed.tokenizer_path
  manifest = shards.read_manifest(Path(made.tokenizer_path).parent)
  assert manifest["request"]["packing"] == "pad"
  same_rows = manifest | {"request": {}}
  assert shards.fingerprint(same_rows) != shards.fingerprint(manifest), "even if the rows were the same"
  use_prepared_folder(config, tmp_path / "prepared")
  np.testing.assert_array_equal(open_dataset(config).train, made.train)
  config.data.packing = "pack"
  with pytest.raises(UserError, match=r"data\.packing \(='pack'\) .* \(='pad'\); set --config\.data\.packing=pad, or "):
    dataset.check_data_config(config)
  config.data.packing = "fill"
  with pytest.raises(UserError, match=r"data\.packing \(='fill'\) must be pack \(.*\) or pad \(.*set --config\.data\."):
    dataset.check_data_config(config)


# The cache.


def test_a_second_run_reuses_the_cache(config, monkeypatch):
  first = open_dataset(config)
  monkeypatch.setattr(preparation._Preparation, "run", lambda *_: pytest.fail("prepared again"))
  second = open_dataset(config)
  np.testing.assert_array_equal(first.train, second.train)
  np.testing.assert_array_equal(first.valid, second.valid)
  assert first[2:] == second[2:]


def test_the_cache_folder_depends_only_on_what_affects_the_sequences(config, tmp_path, monkeypatch):
  folders = []
  monkeypatch.setattr(preparation, "fill_folder", lambda folder, *_, **__: folders.append(folder.name))
  fill = lambda: dataset._fill_cache(config, False)
  fill()
  config.seq_len = 8
  fill()
  config.model.vocab_size = 400
  fill()
  write_lines(tmp_path / "train" / "a.jsonl", sentences(0, 101))
  fill()
  config.data.eval_path = ""
  fill()
  config.data.tokenizer = __file__
  fill()
  monkeypatch.setattr(preparation, "FORMAT_VERSION", preparation.FORMAT_VERSION + 1)
  fill()
  assert len(set(folders)) == len(folders) == 7
  config.update(steps=5, batch_size=3, seed=7)
  config.data.epochs = 2
  fill()
  assert folders[-1] == folders[-2]


def test_the_field_and_bad_rows_in_the_cache(config, tmp_path):
  """The default field has the folder of earlier versions; bad rows are counted in the folder."""
  before = folders.cache_key(preparation.Request("origin", "train:320", 16))
  contents = {"text": "origin", "tokenizer": "train:320", "seq_len": 16, "take": None}  # as earlier versions wrote it
  versions = [preparation.FORMAT_VERSION, contents, tokenizer.sentencepiece.__version__]
  assert before == hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:16]
  whole = open_dataset(config)
  path = Path(config.data.path)
  path.write_text("".join(json.dumps({"text": None, "content": text}) + "\n" for text in TRAIN))
  with pytest.raises(UserError, match=r"a\.jsonl, line 1: .*, or pass --config\.data\.bad_rows=skip to leave"):
    open_dataset(config)
  config.data.field = "content"
  Path(config.data.eval_path).write_text(
    '{"content": 3}\n' + "".join(json.dumps({"content": text}) + "\n" for text in VALID)
  )
  with pytest.raises(UserError, match=r"a\.jsonl, line 1: .*`content`.*found \{.content.: 3\}"):
    open_dataset(config)
  config.data.bad_rows = "skip"
  made = open_dataset(config)
  assert made.fingerprint == whole.fingerprint
  assert made.summary["valid"] == whole.summary["valid"] | {"bad rows skipped": 1}
  assert made.summary["train"] == whole.summary["train"]
  config.data.bad_rows = "stop"
  with pytest.raises(UserError, match=r"left out rows without text \(found 1\)"):
    open_dataset(config)


def test_the_fingerprint_depends_on_the_text_and_not_on_its_path(config, tmp_path):
  here = open_dataset(config)
  config.data.path = str(write_lines(tmp_path / "moved" / "b.jsonl", TRAIN))
  there = open_dataset(config)
  assert here.fingerprint == there.fingerprint and here.tokenizer_path != there.tokenizer_path
  config.data.path = str(
    write_lines(tmp_path / "changed" / "a.jsonl", [*TRAIN[:-1], TRAIN[-1].replace("rock", "sand")])
  )
  assert open_dataset(config).fingerprint != here.fingerprint
  config.data.path, config.seq_len = str(tmp_path / "train" / "a.jsonl"), 8
  assert open_dataset(config).fingerprint != here.fingerprint


def test_an_interrupted_preparation_is_continued(config, monkeypatch):
  def interrupt(*_):
    raise KeyboardInterrupt

  with packing_in(200, 512):
    with monkeypatch.context() as patch:
      patch.setattr(preparation, "_sizes", interrupt)  # after all shards are written
      with pytest.raises(KeyboardInterrupt):
        open_dataset(config)
    (left,) = Path(config.data.cache_dir).iterdir()
    assert not (left / shards.MANIFEST).exists() and len(list(left.glob("train-*.npy"))) > 2
    monkeypatch.setattr(shards, "write_shard", lambda *_: pytest.fail("written again"))
    made = open_dataset(config)
  np.testing.assert_array_equal(made.train, rows_of(tokenizer.load_tokenizer(made.tokenizer_path), TRAIN, 16))


# Prepared sequences.


def test_prepared_sequences_are_read_in_place(config, tmp_path):
  made = use_prepared_folder(config, tmp_path / "rows")
  config.data.cache_dir = str(tmp_path / "none")
  found = open_dataset(config)
  np.testing.assert_array_equal(found.train, made.train)
  np.testing.assert_array_equal(found.valid, made.valid)
  assert found.fingerprint == made.fingerprint and found.bytes_per_token == made.bytes_per_token
  assert found.tokenizer_path == str(tmp_path / "rows" / "tokenizer.model") and not (tmp_path / "none").exists()
  config.data.tokenizer = found.tokenizer_path
  assert open_dataset(config).fingerprint == made.fingerprint


def other_tokenizer(config, folder):
  tokenizer.train_tokenizer(VALID, 300, folder / "other.model")
  config.data.tokenizer = str(folder / "other.model")


def unfinished(config, folder):
  (folder / "rows" / "manifest.json").rename(folder / "rows" / "progress.json")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda config, folder: config.update(seq_len=32),
      r"seq_len \(=32\) must be that .*\(=16\); set --config\.seq_len=16",
    ),
    (
      other_tokenizer,
      r"tokenizer \(='\S+other\.model'\) is not the tokenizer that \S+rows was prepared with; leave it out",
    ),
    (lambda config, folder: config.data.update(tokenizer="none.model"), "there is no such file"),
    (lambda config, folder: config.data.update(tokenizer="train:320"), "trains a tokenizer, but .* prepared with one"),
    (lambda config, folder: config.model.update(vocab_size=300), r"vocabulary \(=300\); it has \d+ pieces"),
    (
      lambda config, folder: config.data.update(path="none"),
      r"\(='none'\) must be a folder filled by .* it has no manifest\.json",
    ),
    (unfinished, "it is not finished: run that command again"),
    (lambda config, folder: config.data.update(eval_path="x"), r"eval_path \(='x'\) is not used when .* is prepared"),
    (lambda config, folder: config.update(steps=1000), r"repeat the text: --config\.data\.epochs=\d+"),
    (lambda config, folder: (folder / "rows" / "manifest.json").write_text("{}"), "is not the JSON that was written"),
    (lambda config, folder: (folder / "rows" / "tokenizer.model").unlink(), "there is no such file"),
  ],
)
def test_a_prepared_folder_that_does_not_match_the_config_is_a_user_error(config, tmp_path, request, change, message):
  use_prepared_folder(config, tmp_path / "rows")
  change(config, tmp_path)
  request.getfixturevalue("forbid_expensive_work")
  with pytest.raises(UserError, match=message):
    dataset.check_data_config(config)
  with pytest.raises(UserError, match=message):
    open_dataset(config)


@pytest.mark.parametrize("name", ["train-00000.npy", "valid-00000.npy", "tokenizer.model"])
def test_a_prepared_file_that_has_changed_is_named(config, tmp_path, name):
  use_prepared_folder(config, tmp_path / "rows")
  path = tmp_path / "rows" / name
  contents = bytearray(path.read_bytes())
  contents[-1 if name.endswith("npy") else contents.index(b"tide")] ^= 1
  path.write_bytes(contents)
  with pytest.raises(UserError, match=rf"{re.escape(str(path))} must have the SHA-256"):
    open_dataset(config)


# A stream.


@pytest.fixture
def streamed(config, tmp_path):
  """A config that streams the text, and the dataset of the same text when prepared."""
  tokenizer.train_tokenizer(TRAIN, 320, tmp_path / "own.model")
  config.data.tokenizer = str(tmp_path / "own.model")
  made = open_dataset(config)
  config.data.source = "stream"
  return config, made


def test_a_stream_yields_the_sequences_in_order(streamed):
  config, made = streamed
  data = open_dataset(config)
  batch_of = loader.make_batch_fn(data.train, config)
  for step in (0, 1, 5, 2):
    batch = batch_of(step)
    assert batch.shape == (4, 16)
    np.testing.assert_array_equal(batch[:], made.train[4 * step : 4 * step + 4])
    np.testing.assert_array_equal(batch[1:3], made.train[4 * step + 1 : 4 * step + 3])
  np.testing.assert_array_equal(data.valid, made.valid)
  assert data.bytes_per_token == made.bytes_per_token
  assert data.summary["train"] == {"read from": config.data.path} and data.summary["valid"] == made.summary["valid"]


def test_the_fingerprint_of_a_stream_depends_on_its_files(streamed):
  config, made = streamed
  first, again = open_dataset(config).fingerprint, open_dataset(config).fingerprint
  os.utime(config.data.path, ns=(1, 1))
  assert first == again != made.fingerprint and open_dataset(config).fingerprint != first


def test_a_stream_prepares_only_its_validation_text(streamed):
  config, _ = streamed
  config.data.cache_dir += "2"
  open_dataset(config)
  (folder,) = Path(config.data.cache_dir).iterdir()
  assert (
    shards.read_manifest(folder)["train"]["documents"] == len(VALID) and shards.read_manifest(folder)["valid"] is None
  )


def test_the_validation_text_of_a_stream_is_packed_as_training_text():
  text = corpus.Corpus(["train"], ["valid"])
  assert dataset._validation_corpus(text) == corpus.Corpus(["valid"], None)
  with pytest.raises(UserError, match=r"source=stream needs validation text; set .*eval_path, or use .* hub"):
    dataset._validation_corpus(text._replace(valid=None))


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("tokenizer", r"stream needs an existing tokenizer; set --config\.data\.tokenizer"),
    ("eval_path", r"stream needs validation text; set --config\.data\.eval_path"),
  ],
)
def test_a_stream_without_tokenizer_or_eval_path_is_a_user_error(streamed, forbid_expensive_work, key, message):
  config, _ = streamed
  config.data[key] = ""
  with pytest.raises(UserError, match=message):
    dataset.check_data_config(config)


def test_validation_text_of_a_stream_shorter_than_a_sequence_is_a_user_error(streamed, tmp_path):
  config, _ = streamed
  config.data.eval_path = str(write_lines(tmp_path / "short" / "a.jsonl", ["A wave."]))
  with pytest.raises(UserError, match="must hold at least one row of 16 tokens"):
    open_dataset(config)


# User errors.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"source": "c4"}, r"--config\.data\.source \(='c4'\) must be one of docs .* text .* prepared .* stream"),
    ({"bad_rows": "drop"}, r"data\.bad_rows \(='drop'\) must be stop or skip; set --config\.data\.bad_rows"),
    ({"source": "docs", "path": "", "eval_path": "", "field": "content"}, r"--config\.data\.field .* is not used when"),
    ({"epochs": 0}, r"data\.epochs \(=0\) must be at least 1"),
    ({"path": ""}, r"--config\.data\.path='c4/\*\.json\.gz'"),
    ({"path": "none/*"}, "matches no file"),
    ({"eval_path": "none/*"}, r"--config\.data\.eval_path .*matches no file"),
    ({"tokenizer": "none.model"}, "there is no such file"),
    ({"tokenizer": __file__}, "must be a SentencePiece model"),
    (
      {"tokenizer": str(GOLDEN)},
      r"tokenizer \(='\S+golden'\) must have a tokenizer\.model or a tokenizer\.json; it has",
    ),
    ({"tokenizer": "train:many"}, r"tokenizer \(='train:many'\) must give the number of pieces, as in train:32000"),
    ({"tokenizer": "train_bytes:"}, r"must give the number of pieces, as in train_bytes:32000"),
    (
      {"tokenizer": "train_bytes:321"},
      r"vocabulary \(=320\); pass --config\.model\.vocab_size=321 or more, or a smaller",
    ),
    ({"source": "docs", "path": "", "eval_path": "", "tokenizer": "none.model"}, "there is no such file"),
    ({"source": "docs"}, r"is not used when --config\.data\.source is docs; leave it out, or add"),
  ],
)
def test_config_errors_are_raised_before_expensive_work(config, forbid_expensive_work, changes, message):
  config.data.update(changes)
  with pytest.raises(UserError, match=message):
    dataset.check_data_config(config)
  with pytest.raises(UserError, match=message):
    open_dataset(config)


def test_a_tokenizer_larger_than_the_vocabulary_is_a_user_error(config, tmp_path):
  tokenizer.train_tokenizer(TRAIN, 320, tmp_path / "model")
  config.data.tokenizer = str(tmp_path / "model")
  dataset.check_data_config(config)
  config.model.vocab_size = 300
  with pytest.raises(UserError, match=r"vocabulary \(=300\); it has \d+ pieces"):
    dataset.check_data_config(config)


def test_more_steps_than_the_text_provides_are_a_user_error(config):
  count = len(open_dataset(config).train)
  config.batch_size = 1
  for epochs in (1, 2):
    config.data.epochs, config.steps = epochs, epochs * count
    open_dataset(config)
    config.steps += 1
    message = (
      rf"needs {config.steps} rows \({config.steps} steps of 1\); the text has {count} rows of 16 tokens, "
      rf"enough for {epochs * count} steps with data\.epochs \(={epochs}\); .*--config\.data\.epochs={epochs + 1}$"
    )
    with pytest.raises(UserError, match=message):
      open_dataset(config)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_text_shorter_than_a_sequence_is_a_user_error(config, tmp_path, split):
  path = write_lines(tmp_path / "short" / "a.jsonl", ["A wave."])
  config.data.update({"path" if split == "train" else "eval_path": str(path)})
  config.data.tokenizer, config.seq_len = str(tmp_path / "own.model"), 60
  tokenizer.train_tokenizer(TRAIN, 320, tmp_path / "own.model")
  with pytest.raises(
    UserError, match=rf"{split} must hold at least one row of 60 tokens; it has \d+ tokens in 1 non-empty"
  ):
    open_dataset(config)
  assert not list(Path(config.data.cache_dir).glob("*/manifest.json"))


def test_text_of_one_sequence_without_validation_files_is_a_user_error(config, tmp_path):
  config.data.update(path=str(write_lines(tmp_path / "short" / "a.jsonl", TRAIN[:1] * 2)), eval_path="")
  config.seq_len = 40
  with pytest.raises(UserError, match=r"at least one row of 40 tokens besides validation; it has \d+ tokens; add text"):
    open_dataset(config)


def test_an_unwritable_cache_is_a_user_error(config, tmp_path):
  (tmp_path / "file").touch()
  config.data.cache_dir = str(tmp_path / "file" / "cache")
  with pytest.raises(UserError, match=r"file/cache/text-\w+ must be a writable directory"):
    open_dataset(config)
