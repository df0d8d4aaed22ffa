"""The command that evaluates: bitwise the numbers that the run logged, other text, and errors."""

import functools
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from grids import command, imported
from stages import slowly
from tiny import resolved, sentences, write_lines, write_text

from switchlora_jax.data import corpus, dataset, preparation
from switchlora_jax.errors import UserError
from switchlora_jax.models.loss import row_losses
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.directory import open_run
from switchlora_jax.training import metrics, phases, trainer
from switchlora_jax.training.evaluation import summary
from switchlora_jax.training.phases import restore_phase

pytestmark = pytest.mark.user_flags

RUNS = {
  **{method: dict(method=method) for method in ("full", "lora", "switchlora", "relora", "galore")},
  "warm start": dict(warm_start_steps=5),  # step 4 is full rank, step 8 has adapters
  "split": dict(sharding__fsdp=4, sharding__frozen="sharded", sharding__candidates="host"),
  "bfloat16": dict(dtype="bfloat16", frozen_dtype="bfloat16", candidates_dtype="bfloat16"),
  "accumulated": dict(batch_size=32, accumulation=2),
  "float64": dict(dtype="float64", param_dtype="float64"),
  "trained": dict(method="switchlora"),
}
TEXTS = sentences(0, 300)
REAL = "trained"  # the other runs only grow their weights, because compiling a train step takes long
SHAPE = dict(steps=8, data__epochs=4, relora__restart_every=4, relora__restart_warmup_steps=2, galore__refresh_every=3)
NUMBERS = [f"val_{name}{suffix}" for name in ("loss", "ppl", "bpb") for suffix in ("", "_se")]


@pytest.fixture(scope="module", autouse=True)
def quickly():
  """No rank learnt."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "make_learnt_rank", lambda _: lambda *_: 0.0)
    yield


@pytest.fixture(autouse=True)
def precision():
  """The command sets it for its process."""
  yield
  jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """With the text and the cache of all runs."""
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(folder):
  """From a name in RUNS to the directory of its run on 8 devices, saved at steps 4 and 8."""

  def train(name: str) -> Path:
    with jax.enable_x64(name == "float64"), pytest.MonkeyPatch.context() as patch:
      if name != REAL:
        patch.setattr(phases, "make_train_step", pretend)
      trainer.train(resolved(folder, **SHAPE | RUNS[name]), folder / name)
    return folder / name

  return functools.cache(train)


def pretend(*_, **__):
  """In place of a train step: the weights grow."""
  grown = lambda x: x + (x / 8).astype(x.dtype)
  step = jax.jit(lambda state: state._replace(step=state.step + 1, params=jax.tree.map(grown, state.params)))
  numbers = {"loss": np.float32(1), "skipped": np.int32(0), "skipped_in_a_row": np.int32(0), "spike": np.int32(0)}
  return lambda state, rows: (step(state), numbers)


def evaluate(folder: Path, run: Path, *arguments) -> dict:
  """What the command writes as JSON, run in this process."""
  out = folder / "found.json"
  with imported("evaluate", f"--run={run}", f"--json={out}", *arguments) as module:
    module.main()
  return json.loads(out.read_text())


def logged(run: Path) -> dict[int, dict]:
  """The evaluations of a run while it was trained, {step: numbers}."""
  return {row["step"]: row for row in metrics.read(run / "metrics.jsonl") if "val_loss" in row}


def fails(sentence: str, *arguments):
  """The command ends with this sentence, before the weights are read."""
  with imported("evaluate", *arguments) as module, pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, "restore_phase", lambda *_: pytest.fail("read the weights before it was checked"))
    with pytest.raises(UserError, match=sentence):
      module.main()


# --- what a run said of itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slowly(RUNS, quick=["switchlora"]))
def test_results_are_bitwise_those_of_the_log(trained, tmp_path, name):
  run, logs = trained(name), logged(trained(name))
  assert list(logs) == [4, 8] and logs[4]["val_loss"] != logs[8]["val_loss"]
  for step, flags in {4: ["--checkpoint=4"], 8: []}.items():
    found = evaluate(tmp_path, run, *flags)
    assert found["step"] == step
    assert {key: found[key] for key in NUMBERS} == {key: logs[step][key] for key in NUMBERS}, "to the bit"


@pytest.mark.slow
def test_results_are_bitwise_equal_on_another_number_of_devices(trained, tmp_path):
  """The run was trained on 8; a process of its own has one."""
  run, out = trained("switchlora"), tmp_path / "out.json"
  done = command("evaluate", f"--run={run}", f"--json={out}", user_flags=True)
  assert done.returncode == 0, done.stderr
  found, log = json.loads(out.read_text()), logged(run)[8]
  assert {key: found[key] for key in NUMBERS} == {key: log[key] for key in NUMBERS}
  assert f"loss: {log['val_loss']:.4f} ± {log['val_loss_se']:.4f} nats per token\n" in done.stdout
  assert f"perplexity: {log['val_ppl']:.2f} ± {log['val_ppl_se']:.2f}\n" in done.stdout
  assert f"bits per byte: {log['val_bpb']:.4f} ± {log['val_bpb_se']:.4f}\n" in done.stdout
  assert "switchlora, step 8\n" in done.stdout
  fingerprint = run_directory.read(run)["data_fingerprint"]
  assert f"data: the run's own validation rows, fingerprint {fingerprint}\n" in done.stdout
  assert f"  {found['rows']} rows, {found['rows'] * 16} tokens, about {found['bytes']} bytes of text\n" in done.stdout
  assert "validate" not in done.stdout + done.stderr  # work this short has no line of progress in a file


def test_the_run_directory_is_unchanged(trained, tmp_path):
  run = trained("switchlora")
  contents = lambda: {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
  before = contents()
  evaluate(tmp_path, run)
  assert contents() == before


# --- other rows and other text ------------------------------------------------------------------------------------


def direct(run: Path, rows) -> np.ndarray:
  """The losses of rows, computed at once."""
  phase, state = restore_phase(open_run(run), None, make_mesh(jax.devices()[:1]))
  return np.asarray(row_losses(phase.model, state.params, state.frozen, np.asarray(rows, np.int32)))


@pytest.mark.slow
def test_tokens_limits_the_sequences(trained, tmp_path):
  run = trained("switchlora")
  own = dataset.open_dataset(open_run(run).config)
  found = evaluate(tmp_path, run, "--tokens=95")
  assert (found["rows"], found["tokens"]) == (5, 80)
  expected = summary(direct(run, own.valid[:5]), own.bytes_per_token)
  assert {key: found[key] for key in NUMBERS} == pytest.approx(expected, rel=1e-5)


def test_a_glob_is_tokenised_with_the_run_s_tokenizer(trained, tmp_path):
  run = trained("switchlora")
  texts = [f"the frozen weight number {i} absorbs what was switched away" for i in range(40)]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:20]))
  (tmp_path / "b.txt").write_text(texts[20] + " é€")
  model = open_run(run).tokenizer
  tokens = []
  processor = dataset.tokenizer.load_tokenizer(model)
  for text in [*texts[:20], texts[20] + " é€"]:
    tokens += [*processor.encode([text])[0], processor.eos]
  size = sum(len(text.encode()) for text in texts[:21]) + len(" é€".encode())
  rows = np.array(tokens[: len(tokens) // 16 * 16]).reshape(-1, 16)

  found = evaluate(tmp_path, run, f"--data={tmp_path}/[ab].*", "--tokens=1000000")
  assert (found["rows"], found["data"]) == (len(rows), f"{tmp_path}/[ab].*")
  assert found["bytes"] == round(rows.size * size / len(tokens))
  expected = summary(direct(run, rows), size / len(tokens))
  assert {key: found[key] for key in NUMBERS} == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def prepared(folder, trained):
  """From names of tokenizer and row length to a folder that is prepared from the text of the runs."""

  def prepare(name: str, model: str, seq_len: int) -> Path:
    text = lambda: corpus.open_corpus(write_text(folder), "", corpus.RowOptions(flags="--"))
    preparation.fill_folder(folder / name, preparation.Request([name], model, seq_len), text, wait=True, progress=False)
    return folder / name

  return prepare


def test_a_prepared_folder_gives_its_validation_sequences(trained, prepared, tmp_path):
  run = trained("switchlora")
  where = prepared("prepared", str(run / "tokenizer.model"), 16)
  found, log = evaluate(tmp_path, run, f"--data={where}"), logged(run)[8]
  assert found["fingerprint"] == run_directory.read(run)["data_fingerprint"], "the same text, the same tokenizer"
  assert {key: found[key] for key in NUMBERS} == {key: log[key] for key in NUMBERS}


@pytest.mark.slow
def test_a_padded_run_is_evaluated_without_padding(tmp_path, monkeypatch):
  """As the run logged it; its tokens and bytes are those of the rows without padding. Packed rows are refused."""
  run, path = tmp_path / "run", write_lines(tmp_path / "a.jsonl", [text[: n % 70] for n, text in enumerate(TEXTS)])
  monkeypatch.setattr(phases, "make_train_step", pretend)
  config = resolved(tmp_path, **SHAPE, method="full", data__packing="pad", data__path=str(path), eval_tokens=200)
  trainer.train(config, run)
  data = dataset.open_dataset(config)
  rows = np.asarray(data.valid)
  tokens = int((rows >= 0).sum())
  found, log = evaluate(tmp_path, run), logged(run)[8]
  assert {key: found[key] for key in NUMBERS} == {key: log[key] for key in NUMBERS}
  assert (found["rows"], found["tokens"], found["bytes"]) == (2, tokens, round(tokens * data.bytes_per_token))
  assert tokens < rows.size
  whole = evaluate(tmp_path, run, f"--data={path}", "--tokens=100")
  lengths = np.cumsum((np.asarray(data.train[:20]) >= 0).sum(1))
  fitting = int((lengths <= 100).sum())
  assert (whole["rows"], whole["tokens"]) == (fitting, lengths[fitting - 1])
  text = lambda: corpus.open_corpus(str(path), "", corpus.RowOptions(flags="--"))
  request = preparation.Request(["packed"], str(run / "tokenizer.model"), 16)
  preparation.fill_folder(tmp_path / "packed", request, text, wait=True, progress=False)
  sentence = r"must have rows made by the packing of the run \(='pad'\); its rows were made by 'pack'; .*--packing=pad"
  fails(sentence, f"--run={run}", f"--data={tmp_path}/packed")


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_a_directory_without_a_run_is_refused(tmp_path):
  fails("--run is missing")
  where = f"--run={tmp_path}/none"
  fails(f"{tmp_path}/none must be the directory of a run, .*; there is no such directory", where)
  fails("they are not there; give the --workdir", f"--run={tmp_path}")


def copy_of(run: Path, folder: Path) -> Path:
  """A copy of a run that a test may damage."""
  return shutil.copytree(run, folder / "copy")


@pytest.mark.parametrize("left", [True, False])
def test_a_run_without_a_checkpoint_is_refused(trained, tmp_path, left):
  run = copy_of(trained("switchlora"), tmp_path)
  shutil.rmtree(run / "checkpoints")
  if left:
    (run / "checkpoints").mkdir()
  fails("has saved no checkpoint yet", f"--run={run}")
  assert (run / "checkpoints").exists() == left


def test_a_step_without_a_checkpoint_is_refused(trained):
  fails(r"--checkpoint \(=5\) must be .*: 4, 8; name one", f"--run={trained('switchlora')}", "--checkpoint=5")


def test_a_config_of_another_version_is_refused(trained, tmp_path):
  run = copy_of(trained("switchlora"), tmp_path)
  saved = run_directory.read(run)
  del saved["config"]["data"]["epochs"]
  (run / "config.json").write_text(json.dumps(saved | {"git_revision": "abc"}))
  fails(r"its config has no data.epochs; evaluate it with that version \(git revision abc\)", f"--run={run}")


def test_a_damaged_step_that_is_named_is_not_replaced_by_another(trained, tmp_path, caplog):
  run = copy_of(trained("switchlora"), tmp_path)
  for path in (run / "checkpoints" / "8").rglob("*"):
    if path.is_file() and path.stat().st_size > 10_000:
      path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match=r"step 8: .*; choose another"):
    evaluate(tmp_path, run, "--checkpoint=8")
  assert evaluate(tmp_path, run)["step"] == 4 and "step 8 is damaged" in caplog.text
  assert (run / "checkpoints" / "8").exists()


def test_changed_data_are_refused(trained, tmp_path):
  run = copy_of(trained("switchlora"), tmp_path)
  saved = run_directory.read(run)
  (run / "config.json").write_text(json.dumps(saved | {"data_fingerprint": "0" * 16}))
  fails("the data changed since the run .* was 0000000000000000.*or evaluate other text with --data", f"--run={run}")


def test_missing_text_is_an_error(trained, tmp_path):
  run = copy_of(trained("switchlora"), tmp_path)
  saved = run_directory.read(run)
  saved["config"]["data"]["path"] = f"{tmp_path}/gone/*"
  (run / "config.json").write_text(json.dumps(saved))
  fails(r"the run's own validation rows: .*matches no file.*; or evaluate other text with --data", f"--run={run}")


def test_data_that_cannot_be_evaluated_are_refused(trained, prepared, tmp_path):
  run, empty = trained("switchlora"), tmp_path / "empty"
  empty.mkdir()
  (tmp_path / "short.txt").write_text("a b")
  (tmp_path / "bad.json").write_text("{\n")
  other = prepared("other", "train:300", 16)
  longer = prepared("longer", str(run / "tokenizer.model"), 32)
  sentences = {
    f"{tmp_path}/*.gz": r"--data \(=.*\) must match .* it matches no file",
    empty: r"--data \(=.*this folder has no manifest.json",
    f"{tmp_path}/short.txt": "must hold at least one row of 16 tokens",
    f"{tmp_path}/bad.json": "bad.json, line 1: expected a JSON object",
    other: r"must be prepared with the tokenizer of the run.*--tokenizer=.*tokenizer.model",
    longer: r"must have rows of 16 tokens like the run; it has rows of 32",
  }
  for data, sentence in sentences.items():
    fails(sentence, f"--run={run}", f"--data={data}")


def test_prepared_rows_that_have_changed_are_refused(trained, prepared):
  run = trained("switchlora")
  where = prepared("changed", str(run / "tokenizer.model"), 16)
  shard = next(where.glob("train-*.npy"))
  shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
  fails(f"{shard.name} must have the SHA-256", f"--run={run}", f"--data={where}")


def test_a_file_that_cannot_be_written_is_refused_first(trained, tmp_path):
  for file in (f"{tmp_path}/none/a.json", tmp_path):
    fails(r"--json \(=.*in a writable directory", f"--run={trained('switchlora')}", f"--json={file}")


def test_infinite_results_are_printed_and_null_in_json(trained, tmp_path, monkeypatch, capsys):
  found = summary(np.array([2000.0]), 2.0)
  with imported("evaluate", f"--run={trained('switchlora')}", f"--json={tmp_path / 'a.json'}") as module:
    monkeypatch.setattr(module, "validate", lambda *_: found)
    module.main()
  printed = capsys.readouterr().out
  assert "loss: 2000.0000 nats per token\n" in printed and "perplexity: inf\n" in printed, "and no error of one row"
  written = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda _: pytest.fail("not JSON"))
  assert written["val_ppl"] is None and math.isclose(written["val_loss"], 2000)
