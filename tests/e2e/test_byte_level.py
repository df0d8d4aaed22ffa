"""A byte-level tokenizer through a whole project: prepare, train, resume, evaluate, generate, export, GLUE's tokens."""

import json

import numpy as np
import pytest
from grids import imported
from tiny import resolved, sentences, write_lines

from switchlora_jax.data import dataset
from switchlora_jax.data.tokenizer import load_tokenizer, tokenizer_sha256
from switchlora_jax.errors import UserError
from switchlora_jax.interop import export, huggingface, pretrained
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.training import metrics, report, trainer

pytestmark = pytest.mark.slow

SEQ_LEN = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """With `rows`, prepared by the command, and `run`, which trained on them for two steps and then for two more."""
  folder = tmp_path_factory.mktemp("bytes")
  write_lines(folder / "text.jsonl", sentences(0, 300))
  flags = [f"--path={folder}/text.jsonl", "--tokenizer=train_bytes:320", f"--seq_len={SEQ_LEN}", "--quiet"]
  with imported("prepare_data", *flags, f"--out={folder}/rows") as prepare_data:
    prepare_data.main()
  for steps in (2, 4):
    trainer.train(config_of(folder, steps), folder / "run")
  return folder


def config_of(folder, steps=4, **changes):
  data = dict(data__source="prepared", data__path=str(folder / "rows"))
  return resolved(
    folder, 1, method="full", seq_len=SEQ_LEN, steps=steps, warmup_steps=1, eval_every=2, **data | changes
  )


@pytest.fixture(scope="module")
def tokenizer(folder):
  return load_tokenizer(folder / "run" / "tokenizer.json")


def test_the_run_resumed_and_learnt(folder):
  rows = [row for row in metrics.read(folder / "run" / "metrics.jsonl") if "val_bpb" in row]
  assert rows[-1]["step"] == 4 and rows[-1]["val_bpb"] < rows[0]["val_bpb"]


def test_the_files_are_kept_unchanged(folder, tokenizer):
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (folder / "run" / name).read_bytes() == (folder / "rows" / name).read_bytes()
  assert not (folder / "run" / "tokenizer.model").exists()
  made = dataset.open_dataset(config_of(folder), progress=False)
  tokens = np.asarray(made.train[np.arange(len(made.train))]).reshape(-1)
  text = sentences(0, 300)
  assert tokenizer.decode(tokens[: tokens.tolist().index(tokenizer.eos)].tolist()) == text[0]
  assert made.bytes_per_token == pytest.approx(
    sum(len(one.encode()) for one in text) / sum(len(ids) + 1 for ids in tokenizer.encode(text))
  )


def test_the_run_is_evaluated(folder, capsys):
  logged = [row for row in metrics.read(folder / "run" / "metrics.jsonl") if "val_loss" in row][-1]
  with imported("evaluate", f"--run={folder}/run", "--quiet", f"--json={folder}/own.json") as evaluate:
    evaluate.main()
  assert json.loads((folder / "own.json").read_text())["val_loss"] == pytest.approx(logged["val_loss"])
  with imported("evaluate", f"--run={folder}/run", "--quiet", f"--data={folder}/rows") as evaluate:
    evaluate.main()
  with imported("evaluate", f"--run={folder}/run", "--quiet", f"--data={folder}/text.jsonl") as evaluate:
    evaluate.main()
  assert capsys.readouterr().out.count("bits per byte") == 3


def test_a_prompt_is_continued(folder, capsys):
  with imported("generate", f"--run={folder}/run", "--prompt=é 👩 Wave", "--max_new_tokens=4") as generate:
    generate.main()
  assert capsys.readouterr().out.startswith("é 👩 Wave")


def test_an_export_has_the_same_tokenizer(folder, tokenizer):
  remarks = export.export(folder / "run", folder / "out").remarks
  assert not remarks and not (folder / "out" / "tokenizer.model").exists()
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (folder / "out" / name).read_bytes() == (folder / "rows" / name).read_bytes()
  config = json.loads((folder / "out" / "config.json").read_text())
  assert (config["eos_token_id"], config["bos_token_id"]) == (tokenizer.eos, None)
  found = pretrained.load(folder / "out")
  assert found.tokenizer == folder / "out" / "tokenizer.json" and found.prefix == ()
  export.export(folder / "run", folder / "out")  # replaces the earlier export
  assert huggingface.inspect_folder(folder / "out").tokenizer == found.tokenizer


def test_a_warm_start_needs_the_same_tokenizer(folder):
  """The tokenizer is that of the source if the files differ in what is not part of it."""
  source = folder / "run" / "tokenizer.json"
  assert tokenizer_sha256(source) == tokenizer_sha256(folder / "rows" / "tokenizer.json")
  other = folder / "other"
  other.mkdir()
  (other / "tokenizer.json").write_bytes(source.read_bytes())
  (other / "tokenizer_config.json").write_text('{"eos_token": "e"}')
  config = config_of(folder, warm_start_from=str(folder / "run"), data__tokenizer=str(other))
  with pytest.raises(UserError, match=r"is not the tokenizer that .*rows was prepared with"):
    dataset.check_data_config(config)
  dataset.check_data_config(config_of(folder, data__tokenizer=str(folder / "run")))


def test_a_prompt_of_the_report_starts_with_a_word(folder, tokenizer):
  made = dataset.open_dataset(config_of(folder), progress=False)
  prompt = report.sample_prompt(made.valid, tokenizer, 4, starts=False)
  assert tokenizer.decode(prompt)[:1] in (" ", "W")


def test_a_run_names_the_tokenizer_that_it_lacks(folder, tmp_path):
  run = run_directory.open_run(folder / "run")
  assert run.tokenizer == folder / "run" / "tokenizer.json"
  (tmp_path / "config.json").write_bytes((folder / "run" / "config.json").read_bytes())
  with pytest.raises(UserError, match=r"with its config\.json and tokenizer\.model; they are not there"):
    run_directory.open_run(tmp_path)
