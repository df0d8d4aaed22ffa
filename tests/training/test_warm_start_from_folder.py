"""Warm starts from a Hugging Face folder. For those from other runs, see test_warm_start.py."""

import json
import shutil

import jax
import numpy as np
import pytest
import short_runs
import small_model
from short_runs import SHAPE, STEPS, lines, logits, refused, train
from small_model import host, same_bits
from stages import slowly
from tiny import resolved

from switchlora_jax.interop import huggingface
from switchlora_jax.methods import FREEZING, PROJECTING
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
  huggingface.write_folder(there, dict(config.model), full.saved[STEPS].params, 16, full.workdir / "tokenizer.model")
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
  options = dict(method="full", warm_start_from=str(there))
  run = train(folder, "from-the-folder", **options)
  assert same_bits(run.outcome.state, other.outcome.state) and lines(run) == lines(other)
  shutil.rmtree(there)
  assert same_bits(train(folder, "from-the-folder", **options).outcome.state, run.outcome.state)


def test_another_kind_of_hugging_face_model_is_refused(folder, hugging_face, tmp_path):
  other = shutil.copytree(hugging_face, tmp_path / "other")
  config = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
  refused(folder, other, "attention_bias is True there, False here")


def test_a_hugging_face_folder_needs_the_same_tokenizer_or_an_explicit_one(folder, full, hugging_face, tmp_path):
  other = shutil.copytree(hugging_face, tmp_path / "other")
  (other / "tokenizer.model").write_bytes(b"other pieces")
  refused(folder, other, f"trained with another tokenizer than this run would be; pass --config.data.tokenizer={other}")
  (other / "tokenizer.model").unlink()
  refused(folder, other, f"--config.warm_start_from={other} has no tokenizer.model")
  named = str(full.workdir / "tokenizer.model")
  config = resolved(folder, devices=1, **SHAPE, method="full", warm_start_from=str(other), data__tokenizer=named)
  source = warm_start.Source(config, phases.build_phase(config, small_model.mesh(1)), small_model.mesh(1))
  source.check_tokenizer(named)


def test_other_sizes_are_refused(folder, hugging_face):
  short_runs.check_sizes_are_refused(folder, hugging_face)
