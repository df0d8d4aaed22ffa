import json
import shlex
import shutil
import subprocess
import sys

import pytest
from grids import command, imported
from paths import ROOT, SHARED
from tiny import flags_of, padded_rows_of, rows_of, sentences, tiny_config, write_lines

from configs import llama_tiny
from switchlora_jax.data import corpus, dataset, shards, tokenizer
from switchlora_jax.errors import UserError

C4 = SHARED / "c4_sample" / "c4_validation_2k.jsonl.gz"
T5 = SHARED / "t5_tokenizer" / "t5_32100.model"


@pytest.fixture
def text(tmp_path):
  """Globs of training and validation files, and a tokenizer."""
  write_lines(tmp_path / "train" / "a.jsonl", sentences(0, 200))
  write_lines(tmp_path / "train" / "b.jsonl", sentences(200, 300))
  write_lines(tmp_path / "valid" / "v.jsonl", sentences(300, 340))
  tokenizer.train_tokenizer(sentences(0, 100), 320, tmp_path / "own.model")
  return tmp_path


def flags(text, **changes) -> list[str]:
  """The flags of a preparation of `text`, changed; None leaves one out."""
  own = dict(path=f"{text}/train/*", eval_path=f"{text}/valid/*", tokenizer=f"{text}/own.model", seq_len=16)
  wanted = own | dict(out=f"{text}/out") | changes
  return [f"--{name}={value}" for name, value in wanted.items() if value is not None]


@pytest.mark.slow
def test_prepare_then_train_on_it(text):
  done = command("prepare_data", *flags(text))
  assert done.returncode == 0, done.stderr
  assert "train on it: python -m experiments.pretrain --workdir=runs/out --config.data.source=prepared" in done.stdout
  assert "train: 300 documents" in done.stdout and "valid: 40 documents" in done.stdout
  config = tiny_config(text, data__source="prepared", data__path=f"{text}/out")
  (text / "train" / "a.jsonl").unlink()  # what was prepared does not need the text
  trained = command("pretrain", *flags_of(config), f"--workdir={text}/run")
  assert trained.returncode == 0, trained.stderr
  fingerprint = json.loads((text / "run" / "config.json").read_text())["data_fingerprint"]
  assert f"data: text, fingerprint {fingerprint}" in done.stdout
  assert f"data: prepared, fingerprint {fingerprint}" in trained.stdout


def test_the_printed_command_is_complete(text, monkeypatch, capsys):
  """It is quoted for the shell, and the config that its flags make is valid for the folder."""
  folder = text / "it's out"
  with imported("prepare_data", *flags(text, out=folder)) as prepare_data:
    prepare_data.main()
  printed = capsys.readouterr().out.split("train on it: ")[1]
  *command, workdir, source, path, length, vocabulary, epochs = shlex.split(printed)
  assert command == ["python", "-m", "experiments.pretrain"] and workdir == "--workdir=runs/it's out"
  assert (source, path) == ("--config.data.source=prepared", f"--config.data.path={folder}")
  assert (length, vocabulary) == ("--config.seq_len=16", "--config.model.vocab_size=320")
  config = llama_tiny.get_config()
  config.data.update(source="prepared", path=str(folder), epochs=int(epochs.removeprefix("--config.data.epochs=")))
  config.seq_len, config.model.vocab_size = 16, 320
  dataset.check_data_config(config)
  config.data.epochs -= 1
  with pytest.raises(UserError, match=rf"repeat the text: {epochs}$"):
    dataset.check_data_config(config)


def test_padded_rows_are_prepared_and_the_command_says_so(text, capsys):
  with imported("prepare_data", *flags(text, packing="pad")) as prepare_data:
    prepare_data.main()
  printed = capsys.readouterr().out
  assert "--config.data.packing=pad" in shlex.split(printed.split("train on it: ")[1])
  manifest, model = shards.read_manifest(text / "out"), tokenizer.load_tokenizer(text / "own.model")
  expected = padded_rows_of(model, sentences(0, 300), 16)
  assert (shards.open_sequences(text / "out", manifest["train"]).__array__() == expected).all()
  cut = manifest["train"]["tokens"] - int((expected >= 0).sum())
  assert manifest["train"]["cut_tokens"] == cut > 0 and f"{cut:,} tokens cut off" in printed
  with (
    imported("prepare_data", *flags(text)) as prepare_data,
    pytest.raises(UserError, match=r"packing was 'pad' and is"),
  ):
    prepare_data.main()


def test_rows_without_text_are_named_or_counted(text, capsys):
  lines = (text / "train" / "b.jsonl").read_text().splitlines(keepends=True)
  (text / "train" / "b.jsonl").write_text("".join([*lines[:3], '{"text": null}\n', *lines[3:]]))
  for model in (f"{text}/own.model", "train:300"):  # the tokenizer's training meets the row first
    message = r"^\S+b\.jsonl, line 4: expected .*; found \{\"text\": null\}; .*, or pass --bad_rows=skip to leave such"
    with (
      imported("prepare_data", *flags(text, tokenizer=model)) as prepare_data,
      pytest.raises(UserError, match=message),
    ):
      prepare_data.main()
    shutil.rmtree(text / "out")
  with imported("prepare_data", *flags(text, bad_rows="skip")) as prepare_data:
    prepare_data.main()
  train = shards.read_manifest(text / "out")["train"]
  assert (train["bad_rows"], train["documents"]) == (1, 300) and "1 bad rows skipped" in capsys.readouterr().out


def test_another_field_can_be_prepared(text):
  for name in ("train/a.jsonl", "train/b.jsonl", "valid/v.jsonl"):
    (text / name).write_text((text / name).read_text().replace('"text"', '"content"'))
  with imported("prepare_data", *flags(text)) as prepare_data, pytest.raises(UserError, match=r"pass --field=content"):
    prepare_data.main()
  with imported("prepare_data", *flags(text, field="content", out=text / "other")) as prepare_data:
    prepare_data.main()
  assert shards.read_manifest(text / "other")["train"]["documents"] == 300


@pytest.mark.skipif(not (C4.exists() and T5.exists()), reason="needs 2,000 documents of C4 and T5's tokenizer")
def test_real_c4_with_t5s_vocabulary(tmp_path):
  given = [f"--path={C4}", f"--tokenizer={T5}", "--seq_len=256", f"--out={tmp_path}/out"]
  with imported("prepare_data", "--source=c4", *given) as prepare_data:
    prepare_data.main()
  train = shards.read_manifest(tmp_path / "out")["train"]
  documents = list(corpus.LocalFile(str(C4)))
  assert train["documents"] == len(documents) == 2000 and train["tokens"] == 995_287
  assert train["characters"] == sum(map(len, documents)) and train["rows"] == train["tokens"] // 256
  found = shards.open_sequences(tmp_path / "out", train)
  expected = rows_of(tokenizer.load_tokenizer(T5), documents[:100], 256)
  assert len(expected) > 100 and (found[: len(expected)].__array__() == expected).all()


@pytest.mark.skipif(not (C4.exists() and T5.exists()), reason="needs 2,000 documents of C4 and T5's tokenizer")
def test_real_c4_padded_with_t5s_vocabulary(tmp_path):
  given = [f"--path={C4}", f"--tokenizer={T5}", "--seq_len=256", "--packing=pad", f"--out={tmp_path}/out"]
  with imported("prepare_data", "--source=c4", *given) as prepare_data:
    prepare_data.main()
  train = shards.read_manifest(tmp_path / "out")["train"]
  assert (train["rows"], train["documents"], train["tokens"]) == (2000, 2000, 995_287)
  found = shards.open_sequences(tmp_path / "out", train).__array__()
  expected = padded_rows_of(tokenizer.load_tokenizer(T5), list(corpus.LocalFile(str(C4))), 256)
  assert (found == expected).all() and train["padding"] == (expected < 0).sum()
  assert train["cut_tokens"] == 995_287 - (expected >= 0).sum()


@pytest.mark.parametrize(
  ("changes", "documents"),
  [({}, range(300)), ({"take": 120}, range(120)), ({"take": 1000}, range(300)), ({"source": "c4"}, range(300))],
)
def test_what_is_prepared(text, changes, documents):
  with imported("prepare_data", *flags(text, **changes)) as prepare_data:
    prepare_data.main()
  manifest = shards.read_manifest(text / "out")
  expected = rows_of(tokenizer.load_tokenizer(text / "own.model"), sentences(0, len(documents)), 16)
  assert (shards.open_sequences(text / "out", manifest["train"])[:].__array__() == expected).all()
  assert manifest["train"]["documents"] == len(documents) and manifest["valid"]["documents"] == 40


def test_a_tokenizer_is_trained_on_request(text):
  with imported("prepare_data", *flags(text, tokenizer="train:300")) as prepare_data:
    prepare_data.main()
  assert tokenizer.load_tokenizer(text / "out" / "tokenizer.model").size <= 300


def test_the_same_command_again_changes_nothing_and_another_is_refused(text):
  with imported("prepare_data", *flags(text)) as prepare_data:
    prepare_data.main()
    before = {path.name: path.stat().st_mtime_ns for path in (text / "out").iterdir()}
    prepare_data.main()
  assert {path.name: path.stat().st_mtime_ns for path in (text / "out").iterdir()}.keys() == before.keys()
  assert all(path.stat().st_mtime_ns == before[path.name] for path in (text / "out").glob("*.npy"))
  with (
    imported("prepare_data", *flags(text, seq_len=32)) as prepare_data,
    pytest.raises(UserError, match="seq_len was 16 and is 32"),
  ):
    prepare_data.main()


def test_c4_without_files_is_that_of_the_hub(text, monkeypatch):
  asked = []
  monkeypatch.setattr(corpus, "open_corpus", lambda *where: asked.append(where[0]))
  for changes in ({"source": "c4", "path": None}, {"source": "hub:some/name:sub", "path": None}, {"source": "c4"}):
    with imported("prepare_data", *flags(text, **changes)) as prepare_data:
      prepare_data.corpus_from_flags()
  assert asked == [corpus.C4, "hub:some/name:sub", f"{text}/train/*"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"out": None}, "--out is missing: set the folder"),
    ({"out": ""}, "--out is missing: set the folder"),
    ({"tokenizer": None}, "--tokenizer is missing: pass a SentencePiece model or a tokenizer.json, or train:32000"),
    ({"tokenizer": "none.model"}, "there is no such file"),
    ({"tokenizer": "train:many"}, "must give the number of pieces"),
    ({"tokenizer": "train:²"}, "must give the number of pieces"),
    ({"tokenizer": "train:99999999999"}, "must give the number of pieces"),
    ({"path": None}, r"--path must be a glob of text files; it is empty; pass e\.g\. --path="),
    ({"path": "none/*"}, r"--path \(='none/\*'\) must match .* matches no file"),
    ({"eval_path": "none/*"}, "--eval_path"),
    ({"source": "wiki"}, r"--source \(='wiki'\) must be text, c4, or hub:NAME"),
    ({"source": "hub:some/name"}, "--path .* is not used with --source=hub:some/name"),
  ],
)
def test_mistakes_are_sentences_before_anything_is_made(text, changes, message, monkeypatch):
  monkeypatch.chdir(text)
  with imported("prepare_data", *flags(text, **changes)) as prepare_data, pytest.raises(UserError, match=message):
    prepare_data.main()
  assert {path.name for path in text.iterdir()} == {"train", "valid", "own.model"}


def test_ctrl_c_says_how_to_go_on(text):
  script = "from switchlora_jax.data import packing\npacking.SHARD = 64\n" + (
    "import os, signal, runpy, sys\nwrite = packing.write_shard\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell in the background has it ignored
    "def interrupt(*args):\n  os.kill(os.getpid(), signal.SIGINT)\n  return write(*args)\n"
    "packing.write_shard = interrupt\nrunpy.run_module('experiments.prepare_data', run_name='__main__')"
  )
  stopped = subprocess.run([sys.executable, "-c", script, *flags(text)], cwd=ROOT, capture_output=True, text=True)
  assert stopped.returncode == 130 and "Traceback" not in stopped.stderr
  assert "the same command continues" in stopped.stderr
  assert not (text / "out" / shards.MANIFEST).exists()
