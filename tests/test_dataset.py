import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from switchlora_jax import corpus, dataset, tokenizer
from switchlora_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"seq_len": 16, "vocab_size": 320, "batch_size": 4, "progress": False}
KILLED = """
import json, os, signal, sys, types
from switchlora_jax import dataset
write = dataset._write_rows
def killed(path, documents, **options):
  write(path, documents, **options)
  os.kill(os.getpid(), signal.SIGKILL)
dataset._write_rows = killed
dataset.prepare(types.SimpleNamespace(**json.loads(sys.argv[1])), **json.loads(sys.argv[2]))
"""


def texts(start, stop):
  return [f"Wave {n} of the tide breaks on rock {n * n}.\nIt falls back {n % 7} times.\n" for n in range(start, stop)]


def write(folder, documents):
  """A folder with a JSON line for each document, as a glob."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
  return f"{folder}/*.jsonl"


@pytest.fixture
def data(tmp_path):
  """A config.data of 100 documents to train on and 20 to validate on."""
  path, eval_path = write(tmp_path / "train", texts(0, 100)), write(tmp_path / "valid", texts(100, 120))
  cache = str(tmp_path / "cache")
  return SimpleNamespace(source="text", path=path, eval_path=eval_path, tokenizer="", cache_dir=cache)


@pytest.fixture
def unbuildable(monkeypatch):
  """From here on, nothing expensive may begin."""

  def refuse(*args, **kwargs):
    raise AssertionError("expensive work began")

  for module, name in ((dataset, "_build"), (corpus, "documentation"), (tokenizer, "train_tokenizer")):
    monkeypatch.setattr(module, name, refuse)


def rows_of(model, documents, seq_len):
  tokens = [token for text in documents for token in [*model.encode(text), model.eos_id()]]
  whole = len(tokens) // seq_len
  return np.reshape(tokens[: whole * seq_len], (whole, seq_len)), len(tokens)


# Rows.


def test_rows_are_the_documents_one_after_another(data):
  made = dataset.prepare(data, **SIZES)
  model = tokenizer.load_tokenizer(made.tokenizer_path, 320)
  for rows, documents, name in ((made.train, texts(0, 100), "train"), (made.valid, texts(100, 120), "valid")):
    expected, tokens = rows_of(model, documents, 16)
    np.testing.assert_array_equal(rows, expected)
    characters = sum(map(len, documents))
    sizes = {"documents": len(documents), "characters": characters, "tokens": tokens, "rows": len(rows)}
    assert made.summary[name] == sizes
  assert made.summary["fingerprint"] == made.fingerprint and made.summary["source"] == "text"


def test_rows_written_a_little_at_a_time_are_the_same_rows(data, tmp_path, monkeypatch):
  whole = dataset.prepare(data, **SIZES)
  monkeypatch.setattr(tokenizer, "BATCH", 150)
  data.cache_dir = str(tmp_path / "other")
  pieces = dataset.prepare(data, **SIZES)
  np.testing.assert_array_equal(whole.train, pieces.train)
  assert whole.fingerprint == pieces.fingerprint


@pytest.mark.parametrize(("vocab_size", "dtype"), [(320, np.uint16), (65_536, np.uint16), (65_537, np.int32)])
def test_rows_are_mapped_and_as_small_as_the_vocabulary_allows(data, vocab_size, dtype):
  made = dataset.prepare(data, **SIZES | {"vocab_size": vocab_size})
  assert isinstance(made.train, np.memmap) and isinstance(made.valid, np.memmap)
  assert made.train.dtype == made.valid.dtype == dtype


def test_the_documentation_of_packages(data, monkeypatch):
  monkeypatch.setattr(corpus, "PACKAGES", ("flax",))
  data.source, data.path, data.eval_path = "docs", "", ""
  made = dataset.prepare(data, **SIZES | {"seq_len": 64, "vocab_size": 1024})
  text = corpus.documentation()
  assert made.summary["train"]["documents"] == len(text.train) > 50
  assert made.summary["overlap"] == corpus.overlap(text.train, text.valid) < 0.05
  model = tokenizer.load_tokenizer(made.tokenizer_path, 1024)
  assert text.valid[0].startswith(model.decode(made.valid[0].tolist())[:50])


def test_without_validation_files_the_last_rows_are_held_out(data, tmp_path):
  data.path = write(tmp_path / "more", texts(0, 200))
  both = dataset.prepare(data, **SIZES)
  data.eval_path = ""
  made = dataset.prepare(data, **SIZES)
  held = len(both.train) // 100
  assert held >= 2 and len(made.valid) == made.summary["valid"]["rows"] == held
  np.testing.assert_array_equal(np.concatenate([made.train, made.valid]), both.train)
  few = dataset.prepare(data, **SIZES | {"seq_len": 256, "batch_size": 2})
  assert len(few.valid) == 1 and len(few.train) < 99 and few.summary["train"]["rows"] == len(few.train)


def test_a_tokenizer_that_is_given_is_used_and_kept(data, tmp_path):
  given = tmp_path / "given.model"
  tokenizer.train_tokenizer(texts(500, 600), 300, given)
  own = dataset.prepare(data, **SIZES)
  data.tokenizer = str(given)
  made = dataset.prepare(data, **SIZES)
  kept = given.read_bytes()
  given.unlink()
  assert Path(made.tokenizer_path).read_bytes() == kept != Path(own.tokenizer_path).read_bytes()
  assert made.fingerprint != own.fingerprint
  expected, _ = rows_of(tokenizer.load_tokenizer(made.tokenizer_path, 300), texts(0, 100), 16)
  np.testing.assert_array_equal(made.train, expected)


# The cache.


def test_a_second_run_takes_the_first_ones_rows(data, request):
  first = dataset.prepare(data, **SIZES)
  request.getfixturevalue("unbuildable")
  second = dataset.prepare(data, **SIZES)
  assert first.train.tobytes() == second.train.tobytes() and first.valid.tobytes() == second.valid.tobytes()
  assert first[2:] == second[2:]


def test_what_decides_the_rows_decides_the_folder(data, tmp_path):
  def folder(**changes):
    return dataset._key(data, **{"seq_len": 16, "vocab_size": 320} | changes)

  keys = [folder(), folder(seq_len=8), folder(vocab_size=400)]
  write(tmp_path / "train", texts(0, 101))
  keys.append(folder())
  data.eval_path = ""
  keys.append(folder())
  data.tokenizer = __file__
  keys.append(folder())
  assert len(set(keys)) == len(keys) and keys[-1] == folder()


def test_the_fingerprint_is_of_the_text_and_not_of_the_place(data, tmp_path):
  here = dataset.prepare(data, **SIZES)
  data.path = write(tmp_path / "moved", texts(0, 100))
  there = dataset.prepare(data, **SIZES)
  assert here.fingerprint == there.fingerprint and here.tokenizer_path != there.tokenizer_path
  data.path = write(tmp_path / "changed", [*texts(0, 99), texts(99, 100)[0].replace("rock", "sand")])
  assert dataset.prepare(data, **SIZES).fingerprint != here.fingerprint
  assert dataset.prepare(data, **SIZES | {"seq_len": 8}).fingerprint != here.fingerprint


def test_a_killed_run_leaves_nothing_that_looks_finished(data):
  command = [sys.executable, "-c", KILLED, json.dumps(vars(data)), json.dumps(SIZES)]
  assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
  (left,) = Path(data.cache_dir).iterdir()
  assert left.name.endswith(".partial") and (left / "rows" / "train.npy").exists()
  assert len(dataset.prepare(data, **SIZES).valid) > 0


def test_an_exception_leaves_nothing(data, monkeypatch):
  def fail(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(dataset, "_fingerprint", fail)
  with pytest.raises(KeyboardInterrupt):
    dataset.prepare(data, **SIZES)
  assert not list(Path(data.cache_dir).iterdir())


def test_two_runs_may_make_the_same_rows(data, monkeypatch):
  build = dataset._build

  def build_while_another_does(folder, *args):
    build(folder, *args)
    monkeypatch.setattr(dataset, "_build", build)
    other.append(dataset.prepare(data, **SIZES))

  other = []
  monkeypatch.setattr(dataset, "_build", build_while_another_does)
  made = dataset.prepare(data, **SIZES)
  assert made[2:] == other[0][2:] and len(list(Path(data.cache_dir).iterdir())) == 1


# Mistakes.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"source": "c4"}, r"--config\.data\.source must be docs .* or text .*; found 'c4'"),
    ({"source": "prepared"}, "found 'prepared'"),
    ({"path": ""}, r"--config\.data\.path='c4/\*\.json\.gz'"),
    ({"path": "none/*"}, "matches no file"),
    ({"eval_path": "none/*"}, r"--config\.data\.eval_path .*matches no file"),
    ({"tokenizer": "none.model"}, "there is no such file"),
    ({"tokenizer": __file__}, "must be a SentencePiece model"),
    ({"source": "docs", "path": "", "eval_path": "", "tokenizer": "none.model"}, "there is no such file"),
    ({"source": "docs"}, "is not read when --config.data.source is docs; add --config.data.source=text"),
  ],
)
def test_mistakes_are_sentences_before_anything_expensive(data, unbuildable, changes, message):
  vars(data).update(changes)
  with pytest.raises(UserError, match=message):
    dataset.check(data, vocab_size=320)
  with pytest.raises(UserError, match=message):
    dataset.prepare(data, **SIZES)


def test_a_tokenizer_larger_than_the_vocabulary_is_a_sentence(data, tmp_path):
  tokenizer.train_tokenizer(texts(0, 100), 320, tmp_path / "model")
  data.tokenizer = str(tmp_path / "model")
  dataset.check(data, vocab_size=320)
  with pytest.raises(UserError, match=r"vocabulary \(=300\); it has \d+ pieces"):
    dataset.check(data, vocab_size=300)


def test_text_shorter_than_a_batch_is_a_sentence(data):
  rows = len(dataset.prepare(data, **SIZES).train)
  assert len(dataset.prepare(data, **SIZES | {"batch_size": rows}).train) == rows
  message = rf"batch, {rows + 1} rows of 16 tokens \(={(rows + 1) * 16:,}\) .* has [\d,]+ tokens, {rows} rows .* lower"
  with pytest.raises(UserError, match=message):
    dataset.prepare(data, **SIZES | {"batch_size": rows + 1})
  with pytest.raises(UserError, match=r"has [\d,]+ tokens, 0 rows"):
    dataset.prepare(data, **SIZES | {"seq_len": 1 << 20})


def test_validation_text_shorter_than_a_row_is_a_sentence(data, tmp_path):
  data.eval_path = write(tmp_path / "short", ["A wave."])
  with pytest.raises(UserError, match=r"--config\.data\.eval_path .* at least one row of 16 tokens"):
    dataset.prepare(data, **SIZES)


def test_a_cache_that_cannot_be_written_is_a_sentence(data, tmp_path):
  (tmp_path / "file").touch()
  data.cache_dir = str(tmp_path / "file" / "cache")
  with pytest.raises(UserError, match=r"--config\.data\.cache_dir .* must be a directory that can be written.*; name"):
    dataset.prepare(data, **SIZES)


# Batches.

ROWS = np.arange(10, dtype=np.uint16)[:, None] * np.ones(3, np.uint16)


def stream(batch_size, examples, seed=0):
  """The first examples of a run, as numbers of rows."""
  steps = range(-(-examples // batch_size))
  batches = [dataset.batch(ROWS, seed=seed, step=step, batch_size=batch_size)[:] for step in steps]
  return np.concatenate(batches)[:examples, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23])
def test_each_epoch_takes_every_row_once(batch_size):
  epochs = np.reshape(stream(batch_size, 40), (4, 10))
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (4, 1)))
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed_and_not_on_the_batch_size():
  assert stream(4, 40) == stream(7, 40) == stream(23, 40)
  assert stream(4, 40) != stream(4, 40, seed=1)
  assert stream(4, 40) != sorted(stream(4, 40))


def test_a_batch_is_a_function_of_its_step():
  late = dataset.batch(ROWS, seed=3, step=17, batch_size=4)[:]
  for step in (17, 2, 17):
    again = dataset.batch(ROWS, seed=3, step=step, batch_size=4)[:]
  np.testing.assert_array_equal(late, again)
  assert late.dtype == np.int32 and late.shape == (4, 3) and type(late) is np.ndarray


def test_batches_of_rows_on_disk(data):
  rows = dataset.prepare(data, **SIZES).train
  once = dataset.batch(rows, seed=0, step=0, batch_size=len(rows))[:]
  assert type(once) is np.ndarray and once.dtype == np.int32
  assert sorted(once.tolist()) == sorted(rows.tolist()) and once.tolist() != rows.tolist()
