"""Warm starts from a Hugging Face folder. For those from other runs, see test_warm_start.py."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import short_runs
import small_model
from short_runs import SHAPE, STEPS, lines, logits, refused, train
from small_model import host, same_bits
from stages import slowly
from tiny import resolved, tiny_config

from switchlora_jax.errors import UserError
from switchlora_jax.interop import huggingface
from switchlora_jax.methods import FREEZING, PROJECTING
from switchlora_jax.runs.directory import open_run
from switchlora_jax.training import phases, warm_start

pytestmark = pytest.mark.user_flags


@pytest.fixture(scope="module")
def full(folder):
  """A full-rank run."""
  return train(folder, "full", method="full")


@pytest.fixture(scope="module")
def hugging_face(folder, full):
  """The weights of the full-rank run as a Hugging Face folder."""
  there = folder / "hugging-face"
  there.mkdir()
  config = resolved(folder, devices=1)
  huggingface.write_folder(there, config.model.to_dict(), full.saved[STEPS].params, full.workdir / "tokenizer.model")
  return there


@pytest.mark.parametrize("method", slowly((*FREEZING, *PROJECTING, "apollo_mini"), quick=["switchlora"]))
def test_the_initial_logits_are_those_of_the_hugging_face_folder(folder, full, hugging_face, method):
  config = resolved(folder, devices=1, **SHAPE, method=method, warm_start_from=str(hugging_face))
  ours = phases.build_phase(config, small_model.mesh(1))
  state = warm_start.Source(config, ours, small_model.mesh(1)).state()
  expected = logits(full.outcome.phase, full.saved[STEPS], full)
  np.testing.assert_allclose(logits(ours, state, full), expected, rtol=0, atol=2e-6)
  assert same_bits(state.candidates, host(ours.create()).candidates)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves((state.opt_state, state.step, state.skipped)))


def test_a_run_from_a_hugging_face_folder_equals_one_from_the_exported_run(folder, full, hugging_face):
  """Bitwise, if the folder has the weights of the run. The folder is needed only until the first checkpoint."""
  other = train(folder, "from-the-run", method="full", warm_start_from=str(full.workdir))
  there = shutil.copytree(hugging_face, folder / "gone")
  options = dict(method="full", warm_start_from=str(there), data__tokenizer=str(there / "tokenizer.model"))
  run = train(folder, "from-the-folder", **options)
  assert same_bits(run.outcome.state, other.outcome.state) and lines(run) == lines(other)
  shutil.rmtree(there)
  continued = tiny_config(folder, **SHAPE, **options)
  warm_start.adopt_architecture(continued, (), run.workdir)
  kept = continued.data.tokenizer
  assert kept == str(run.workdir / "tokenizer.model")
  again = train(folder, "from-the-folder", **options | {"data__tokenizer": kept})
  assert same_bits(again.outcome.state, run.outcome.state)


def test_the_weights_of_a_model_of_the_hub_are_downloaded_last_and_once(folder, hugging_face, monkeypatch, tmp_path):
  asked = []

  def download(name, revision, allow_patterns):
    asked.append((name, revision, allow_patterns))
    for file in filter(Path.exists, map(hugging_face.joinpath, allow_patterns)):
      shutil.copy(file, tmp_path)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  keys = dict(SHAPE, method="full", warm_start_from="hub:some/model@v1.0")
  config = tiny_config(folder, **keys | dict(model__num_layers=1))
  for _ in range(2):
    line = warm_start.adopt_architecture(config, (), None)
  assert line is None and config.model.num_layers == 2
  assert config.data.tokenizer == str(tmp_path / "tokenizer.model")
  ((*which, patterns),) = asked
  assert which == ["some/model", "v1.0"] and not any("safetensors" in pattern for pattern in patterns)
  warm_start.adopt_architecture(config, (), None, weights=True)
  config = resolved(folder, devices=1, **keys)
  for _ in range(2):
    warm_start.Source(config, phases.build_phase(config, small_model.mesh(1)), small_model.mesh(1))
  (_, (*which, patterns)) = asked
  assert which == ["some/model", "v1.0"] and {"config.json", "model.safetensors", "tokenizer.json"} <= set(patterns)


def test_another_kind_of_hugging_face_model_is_refused(folder, hugging_face, tmp_path):
  other = shutil.copytree(hugging_face, tmp_path / "other")
  config = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
  refused(folder, other, "attention_bias is True, not False")


def test_a_hugging_face_folder_needs_the_same_tokenizer_or_an_explicit_one(folder, full, hugging_face, tmp_path):
  other = shutil.copytree(hugging_face, tmp_path / "other")
  (other / "tokenizer.model").write_bytes(b"other pieces")
  refused(folder, other, f"trained with another tokenizer than this run would be; pass --config.data.tokenizer={other}")
  (other / "tokenizer.model").unlink()
  named = str(full.workdir / "tokenizer.model")
  config = resolved(folder, devices=1, **SHAPE, method="full", warm_start_from=str(other), data__tokenizer=named)
  source = warm_start.Source(config, phases.build_phase(config, small_model.mesh(1)), small_model.mesh(1))
  source.check_tokenizer(named)  # tokenizer.json is the conversion of this model
  (other / "tokenizer_config.json").write_text('{"eos_token": "e"}')
  with pytest.raises(UserError, match="trained with another tokenizer"):
    source.check_tokenizer(named)
  (other / "tokenizer.json").unlink()
  refused(folder, other, f"--config.warm_start_from={other} has no tokenizer.model or tokenizer.json")
  source = warm_start.Source(config, phases.build_phase(config, small_model.mesh(1)), small_model.mesh(1))
  source.check_tokenizer(named)


def test_other_sizes_are_refused(folder, hugging_face):
  short_runs.check_sizes_are_refused(folder, hugging_face)


# --- the architecture of the source -------------------------------------------------------------------------------


def adopted(folder, source, given=(), workdir=None, **changes):
  """(a config of other sizes after `adopt_architecture`, the line that it prints)"""
  config = tiny_config(folder, **SHAPE, warm_start_from=str(source), **changes)
  config.model.update(hidden_size=64, num_heads=4)
  return config, warm_start.adopt_architecture(config, given, workdir)


def test_the_architecture_of_a_folder_is_adopted(folder, full, hugging_face):
  config, line = adopted(folder, hugging_face)
  expected = open_run(full.workdir).architecture
  assert config.model.to_dict() == expected
  assert config.data.tokenizer == str(hugging_face / "tokenizer.model")
  assert line.startswith(f"set from {hugging_face}: model.hidden_size=16 ") and " model.num_heads=2 " in line
  assert " model.max_position=16" in line and "vocab_size" not in line, "only keys that change"


def test_keys_that_are_given_stay(folder, hugging_face):
  config, line = adopted(folder, hugging_face, given=("model.num_heads", "data.tokenizer"))
  assert (config.model.hidden_size, config.model.num_heads, config.data.tokenizer) == (16, 4, "")
  assert "num_heads=" not in line and "tokenizer" not in line


def test_a_run_gives_its_architecture_and_its_tokenizer(folder, full):
  config, line = adopted(folder, full.workdir)
  expected = open_run(full.workdir).architecture | {"max_position": None}  # the default is the new run's seq_len
  assert config.model.to_dict() == expected and config.data.tokenizer == str(full.workdir / "tokenizer.model")
  assert "data.tokenizer=" in line and "max_position" not in line
  config, line = adopted(folder, "")
  assert line is None and config.model.hidden_size == 64


def test_a_run_that_continues_does_not_need_its_source(folder, full, tmp_path):
  config, line = adopted(folder, tmp_path / "gone", workdir=full.workdir)
  assert config.model.to_dict() == open_run(full.workdir).architecture and line is None
  with pytest.raises(UserError, match=r"--config\.warm_start_from: .*gone must be the directory of a run"):
    adopted(folder, tmp_path / "gone")


def test_a_damaged_config_of_a_run_is_left_to_its_own_check(folder, full, tmp_path):
  workdir = shutil.copytree(full.workdir, tmp_path / "run")
  path = workdir / "config.json"
  saved = json.loads(path.read_text())
  saved["config"]["model"]["a_later_key"] = 1
  del saved["config"]["data"]["tokenizer"]
  path.write_text(json.dumps(saved))
  assert adopted(folder, "gone", workdir=workdir)[0].model.hidden_size == 16
  saved["config"]["model"]["num_layers"] = "two"
  path.write_text(json.dumps(saved))
  with pytest.raises(UserError, match=r"model\.num_layers \(='two'\) of .*run has another type"):
    adopted(folder, "gone", workdir=workdir)


def test_a_tied_embedding_may_become_a_head_of_its_own(folder, full, hugging_face, tmp_path):
  there = shutil.copytree(hugging_face, tmp_path / "tied")
  config = json.loads((there / "config.json").read_text())
  (there / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
  for tied in (True, False):
    changes = dict(method="full", warm_start_from=str(there), model__tied_embeddings=tied)
    config = resolved(folder, devices=1, **SHAPE, **changes)
    phase = phases.build_phase(config, small_model.mesh(1))
    params = host(warm_start.Source(config, phase, small_model.mesh(1)).state().params)
    assert ("head" in params) != tied
    if not tied:
      np.testing.assert_array_equal(params["head"]["kernel"], params["embed"]["embedding"].T)


def test_other_rotary_positions_are_a_warning(folder, hugging_face, caplog):
  changes = dict(method="full", warm_start_from=str(hugging_face), model__rope__base=5e5)
  config = resolved(folder, devices=1, **SHAPE, **changes)
  warm_start.Source(config, phases.build_phase(config, small_model.mesh(1)), small_model.mesh(1))
  (line,) = [record.getMessage() for record in caplog.records]
  assert line.startswith("the rotary positions are not those of --config.warm_start_from: Rope(base=10000.0")
