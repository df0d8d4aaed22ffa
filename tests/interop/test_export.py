"""Exports compute the logits of the run; wrong exports are refused."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import imported
from safetensors import SafetensorError
from small_model import same_bits
from stages import slowly
from tiny import saved_run

from switchlora_jax.errors import UserError
from switchlora_jax.interop import export, huggingface, pretrained
from switchlora_jax.methods import FREEZING
from switchlora_jax.models.weights import flatten_dict
from switchlora_jax.runs.directory import open_run

WRITTEN = {  # with a SentencePiece tokenizer
  "config.json", "export.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
  "tokenizer_config.json",
}  # fmt: skip
KINDS = {"q", "k", "v", "o", "gate", "up", "down"}
STEPS = {"lora": 4, "switchlora": 0, "full": 0, "sltrain": 4, "factored": 0}  # without a step some factors would be 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Maps a method to the directory of a run that has saved a checkpoint."""
  folder = tmp_path_factory.mktemp("runs")
  return functools.cache(lambda method: saved_run(folder / method, steps=STEPS[method], method=method))


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", slowly(STEPS, quick=["switchlora", "sltrain"]))
def test_an_export_computes_the_logits_of_the_run(run, tmp_path, method):
  """The factors and the sparse part are merged into the kernels, not left out.

  `saved_run` triples the parameters, so that the kernels of `factored`, which are products, are nine times as large.
  """
  done = export.export(run(method), tmp_path / "out")
  assert done.difference <= (5e-5 if method == "factored" else 1e-5) and done.remarks == []
  assert done.origin == f"{run(method)}, {method}, step {STEPS[method]} of 12"
  assert not (tmp_path / "out.unverified").exists()
  assert set(contents(tmp_path / "out")) == WRITTEN
  record = json.loads((tmp_path / "out" / "export.json").read_text())
  assert record["origin"] == done.origin and record["largest_difference_of_logits"] == done.difference
  if method not in FREEZING:
    assert done.adapters == {}
    return
  state = pretrained.restore_weights(open_run(run(method)))
  merged, base = flatten_dict(pretrained.load(tmp_path / "out").weights), flatten_dict(state.frozen)
  assert set(done.adapters) == KINDS
  for path, kernel in base.items():
    expected = np.linalg.norm(merged[path] - kernel) / np.linalg.norm(kernel)
    assert done.adapters[path[1]] == pytest.approx(expected, rel=1e-4) and expected > 0.05


@pytest.mark.parametrize("method", ["lora", "switchlora"])
def test_transformers_computes_the_logits_of_the_run(run, tmp_path, method):
  torch = pytest.importorskip("torch", reason="needs requirements-torch.txt; another test compares recorded logits")
  from transformers import AutoModelForCausalLM, AutoTokenizer

  export.export(run(method), tmp_path / "out")
  model, opened = (
    AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    pretrained.restore_weights(open_run(run(method))),
  )
  tokens = np.random.default_rng(1).integers(0, 320, (2, 16))
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  ours = np.asarray(opened.model.apply({"params": opened.params, "frozen": opened.frozen}, tokens))
  assert np.abs(ours).max() > 0.1
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
  text = "12: the model learns\n  a low rank\tupdate é"
  sentencepiece = huggingface.tokenizer_json.load_tokenizer(tmp_path / "out" / "tokenizer.model")
  assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == sentencepiece.encode([text])[0]


def test_an_export_read_and_written_again_is_the_same(run, tmp_path):
  export.export(run("switchlora"), tmp_path / "out")
  model = pretrained.load(tmp_path / "out")
  (tmp_path / "again").mkdir()
  huggingface.write_folder(tmp_path / "again", model.architecture, model.weights, model.tokenizer)
  first = contents(tmp_path / "out")
  del first["export.json"]
  assert contents(tmp_path / "again") == first


def test_an_export_in_bfloat16_has_the_rounded_weights(run, tmp_path):
  """The difference by rounding is reported apart from that of the folder, which has a limit."""
  done = export.export(run("switchlora"), tmp_path / "out", "bfloat16")
  assert done.difference <= 1e-5 and 1e-4 < done.rounding < 1
  exact = pretrained.merge(pretrained.restore_weights(open_run(run("switchlora")))).weights
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), exact)
  assert same_bits(pretrained.load(tmp_path / "out").weights, rounded)


# --- refused exports ---------------------------------------------------------------------------------------------


def bare_base(model, opened):
  """Base kernels in place of merged kernels."""
  blocks = {name: opened.frozen["blocks"].get(name, layer) for name, layer in model.weights["blocks"].items()}
  return model._replace(weights=model.weights | {"blocks": jax.tree.map(np.asarray, blocks)})


def queries_and_keys_swapped(model, opened):
  blocks = model.weights["blocks"]
  return model._replace(weights=model.weights | {"blocks": blocks | {"q": blocks["k"], "k": blocks["q"]}})


def not_a_number(model, opened):
  return model._replace(weights=jax.tree.map(lambda x: x * np.nan, model.weights))


@pytest.mark.parametrize("wrong", [bare_base, queries_and_keys_swapped, not_a_number])
def test_wrong_weights_are_refused(run, tmp_path, monkeypatch, wrong):
  """The wrong export keeps its temporary name until the next export replaces it."""
  merge = pretrained.merge
  monkeypatch.setattr(pretrained, "merge", lambda opened: wrong(merge(opened), opened))
  with pytest.raises(UserError, match=r"its logits differ from the run's by .*, more than 1e-04.*must not be used"):
    export.export(run("switchlora"), tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["out.unverified"]
  monkeypatch.undo()
  export.export(run("switchlora"), tmp_path / "out")
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_only_an_earlier_export_is_replaced(run, tmp_path):
  out = tmp_path / "out"
  export.export(run("lora"), out)
  lora = contents(out)
  export.export(run("switchlora"), out)
  assert contents(out)["model.safetensors"] != lora["model.safetensors"]

  def refused(what, sentence):
    before = contents(out)
    with pytest.raises(UserError, match=sentence):
      export.export(run("lora"), what)
    assert contents(out) == before

  (out / "notes.txt").write_text("mine")
  refused(out, "must be new, empty or an earlier export; it holds notes.txt; choose another --out")
  refused(out / "notes.txt", "must be a folder to write to; it is a file")
  (out / "notes.txt").unlink()
  (out / "export.json").unlink()
  refused(out, "must be new, empty or an earlier export; it holds config.json, generation_config.json, model.safetens")
  refused(run("lora"), "must be new, empty or an earlier export; it holds checkpoints")
  shutil.copytree(run("lora"), tmp_path / "new.unverified")
  refused(tmp_path / "new", "new.unverified must be new, empty")


def test_a_read_only_folder_is_refused(run, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"--out=.*/file/out cannot be written \(Not a directory\)"):
    export.export(run("lora"), tmp_path / "file" / "out")


def test_a_full_disk_is_an_error_and_keeps_the_earlier_export(run, tmp_path, monkeypatch):
  export.export(run("lora"), tmp_path / "out")
  before = contents(tmp_path / "out")

  def fail(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

  monkeypatch.setattr(huggingface, "save_file", fail)
  with pytest.raises(UserError, match=r"--out=.*/out cannot be written \(.*No space left on device"):
    export.export(run("lora"), tmp_path / "out")
  assert contents(tmp_path / "out") == before


def test_a_link_is_followed(run, tmp_path):
  """For example to a folder on a larger disk."""
  (tmp_path / "far").mkdir()
  (tmp_path / "out").symlink_to(tmp_path / "far")
  export.export(run("lora"), tmp_path / "out")
  assert (tmp_path / "out").is_symlink() and set(contents(tmp_path / "far")) == WRITTEN


def test_the_root_is_refused(run):
  with pytest.raises(UserError, match="/ must be new, empty or an earlier export"):
    export.export(run("lora"), Path("/"))


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["switchlora", "full"])
def test_the_command_reports_the_export(run, tmp_path, capsys, method):
  with imported("export", f"--run={run(method)}", f"--out={tmp_path / 'out'}") as command:
    command.main()
  output = capsys.readouterr().out
  assert f"exported: {run(method)}, {method}, step {STEPS[method]} of 12\nlargest difference of logits" in output
  if method == "full":
    assert "the run has no adapters" in output
  else:
    assert "merged weights differ from the base weights" in output and all(
      f"\n  {kind:<5} " in output for kind in KINDS
    )
  assert output.endswith(f"saved in: {tmp_path / 'out'} ({', '.join(sorted(WRITTEN))})\n")


def test_the_command_refuses_a_directory_without_a_run(run, tmp_path):
  (tmp_path / "config.json").write_text("{}")
  for source in (tmp_path, tmp_path / "nowhere"):
    with imported("export", f"--run={source}", f"--out={tmp_path / 'out'}") as command, pytest.raises(UserError):
      command.main()
  assert not (tmp_path / "out").exists()


def test_the_command_requires_both_flags(run):
  for given, missing in (([], "run"), (["--run=somewhere"], "out")):
    with imported("export", *given) as command, pytest.raises(UserError, match=f"--{missing} is missing"):
      command.main()
