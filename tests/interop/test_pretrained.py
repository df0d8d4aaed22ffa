"""Plain weights of a run or of a Hugging Face folder compute the logits of the trained model."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from paths import GOLDEN
from sentencepiece import SentencePieceTrainer
from stages import slowly
from tiny import saved_run

from switchlora_jax.errors import UserError
from switchlora_jax.interop import pretrained
from switchlora_jax.lowrank import kernel_storage
from switchlora_jax.models import make_model
from switchlora_jax.runs.directory import open_run

pytestmark = pytest.mark.two_linear_layers

SIZES = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The directory of a SwitchLoRA run."""
  folder = tmp_path_factory.mktemp("runs")
  return functools.cache(lambda: saved_run(folder / "run"))


def largest_difference(model, opened):
  """Largest difference of logits between plain weights and the run's own model."""
  tokens = np.arange(48).reshape(3, 16) * 7 % 320
  ours = np.asarray(jax.jit(opened.model.apply)({"params": opened.params, "frozen": opened.frozen}, tokens))
  plain = make_model(model.architecture, dtype=ours.dtype, param_dtype=ours.dtype)
  assert np.abs(ours).max() > 0.1
  return np.abs(np.asarray(jax.jit(plain.apply)({"params": model.weights}, tokens)) - ours).max()


def test_the_plain_weights_of_a_run_compute_its_logits(run):
  model = pretrained.load(run())
  assert (model.architecture | SIZES, model.seq_len) == (model.architecture, 16)
  assert model.tokenizer == run() / "tokenizer.model"
  assert model.origin == f"{run()}, switchlora, step 0 of 12"
  assert {type(x) for x in jax.tree.leaves(model.weights)} == {np.ndarray}
  assert {str(x.dtype) for x in jax.tree.leaves(model.weights)} == {"float32"}
  opened = pretrained.restore_weights(open_run(run()))
  assert largest_difference(model, opened) < 1e-5
  base = model._replace(weights=model.weights | {"blocks": model.weights["blocks"] | opened.frozen["blocks"]})
  assert largest_difference(base, opened) > 0.01


STORED = [{"frozen_dtype": "bfloat16"}, {"frozen_dtype": "int8"}, {"param_dtype": "bfloat16"}]


@pytest.mark.slow
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_weights_stored_in_narrow_dtypes_are_merged_in_float32(tmp_path, stored):
  """Residuals are left out, as in the forward pass."""
  workdir = saved_run(tmp_path / "run", **stored)
  model, opened = pretrained.load(workdir), pretrained.restore_weights(open_run(workdir))
  assert {str(x.dtype) for x in jax.tree.leaves(model.weights)} == {"float32"}
  assert largest_difference(model, opened) < 1e-5


@pytest.mark.parametrize("dtype", slowly(["bfloat16", "int8"], quick=["int8"]))
def test_the_residual_of_a_kernel_is_added_on_request(tmp_path, dtype):
  """The merged kernel is then the sum of kernel, residual and adapter product."""
  opened = pretrained.restore_weights(open_run(saved_run(tmp_path / "run", steps=3, frozen_dtype=dtype)))
  frozen = opened.frozen["blocks"]["up"]
  assert {"kernel", "kernel_tail"} <= set(frozen) and np.any(frozen["kernel_tail"])
  kernels = [pretrained.merge(opened, residual=flag).weights["blocks"]["up"]["kernel"] for flag in (False, True)]
  stored, read = (jax.jit(f)(frozen) for f in (kernel_storage.load_kernel, kernel_storage.forward_kernel))
  expected = np.asarray(stored) - np.asarray(read, np.float32)
  np.testing.assert_allclose(kernels[1] - kernels[0], expected, rtol=0, atol=2**-22)
  assert np.abs(expected).max() > 2**-14


def test_a_run_with_a_warm_start_is_read_in_the_phase_of_its_checkpoint(tmp_path):
  """A checkpoint of the full-rank phase has no adapters."""
  workdir = saved_run(tmp_path / "run", method="full")
  saved = json.loads((workdir / "config.json").read_text())
  saved["config"] |= {"method": "lora", "warm_start_steps": 3}
  (workdir / "config.json").write_text(json.dumps(saved))
  opened = pretrained.restore_weights(open_run(workdir))
  assert (opened.step, opened.frozen, opened.scale) == (0, {}, None)
  assert largest_difference(pretrained.load(workdir), opened) == 0


def test_a_key_that_only_the_warm_start_needs_is_not_reported_as_damage(tmp_path):
  workdir = saved_run(tmp_path / "run", method="full")
  saved = json.loads((workdir / "config.json").read_text())
  saved["config"] |= {"method": "lora", "warm_start_steps": 3}
  del saved["config"]["warm_start_learning_rate"]
  (workdir / "config.json").write_text(json.dumps(saved))
  shutil.copytree(workdir / "checkpoints" / "0", workdir / "checkpoints" / "4")  # a step of the other phase
  with pytest.raises(UserError, match=r"^the run in .* was made by another version of the code"):
    pretrained.restore_weights(open_run(workdir), 0)


@pytest.mark.slow
def test_a_run_in_float64_is_read_in_float64(tmp_path):
  with jax.enable_x64(True):
    workdir = saved_run(tmp_path / "run", dtype="float64", param_dtype="float64", method="lora")
  model, opened = pretrained.load(workdir), pretrained.restore_weights(open_run(workdir))
  assert {str(x.dtype) for x in jax.tree.leaves(model.weights)} == {"float64"}
  with pretrained.full_precision("float64"):
    assert largest_difference(model, opened) < 1e-13


def test_a_hugging_face_folder_is_read():
  folder = GOLDEN / "huggingface"
  model = pretrained.read(pretrained.inspect(folder))
  assert (model.architecture["vocab_size"], model.seq_len, model.tokenizer, model.origin) == (64, 32, None, str(folder))
  with pytest.raises(UserError, match=r"must hold tokenizer\.model or tokenizer\.json, the"):
    pretrained.load(folder)


def test_the_tokenizer_of_a_folder_must_fit_its_model(run, tmp_path):
  """The embeddings of larger ids would be NaN, and text could still be sampled."""
  folder = shutil.copytree(GOLDEN / "huggingface", tmp_path / "model")  # 64 ids
  shutil.copy(run() / "tokenizer.model", folder)
  refused(folder, "must fit in the model's vocabulary (=64); it has 320 pieces; replace it by")


def test_the_tokenizer_of_a_folder_must_have_an_end_of_sentence_piece(run, tmp_path):
  folder = shutil.copytree(GOLDEN / "huggingface", tmp_path / "model")
  options = dict(vocab_size=64, hard_vocab_limit=False, eos_id=-1, minloglevel=2)
  text = (run() / "text.txt").read_text().splitlines()
  SentencePieceTrainer.train(sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), **options)
  with pytest.raises(UserError, match="must have an end-of-sentence piece"):
    pretrained.load(folder)


# --- mistakes -----------------------------------------------------------------------------------------------------


def refused(path, sentence):
  before = sorted(path.rglob("*"))
  with pytest.raises(UserError) as caught:
    pretrained.load(path)
  assert sentence in str(caught.value) and str(path) in str(caught.value)
  assert sorted(path.rglob("*")) == before, "the files must stay as they were"


def test_a_path_that_is_neither_a_run_nor_a_hugging_face_folder_is_refused(run, tmp_path):
  nowhere = "must be the directory of a run that has saved a checkpoint, or a Hugging Face folder"
  refused(tmp_path / "nowhere", nowhere)
  refused(tmp_path / "nowhere", "; there is no such directory")
  refused(tmp_path, "or a Hugging Face folder (config.json, model.safetensors); it is neither")
  shutil.copy(run() / "config.json", tmp_path)
  refused(tmp_path, "with its config.json and tokenizer.model; they are not there")
  shutil.copy(run() / "tokenizer.model", tmp_path)
  refused(tmp_path, "has saved no checkpoint yet")
  (tmp_path / "config.json").write_text("[1]")
  refused(tmp_path, "must hold a JSON object")


def test_a_run_that_has_saved_nothing_is_refused(run, tmp_path):
  workdir = shutil.copytree(run(), tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / "0")
  refused(workdir, "has saved no checkpoint yet; let it train longer")


@pytest.mark.parametrize("key", ["param_dtype", "model", "relora"])
def test_a_run_of_another_version_is_refused(run, tmp_path, key):
  other = shutil.copytree(run(), tmp_path / "other")
  saved = json.loads((other / "config.json").read_text())
  del saved["config"][key]
  saved["config"]["method"] = "relora"
  (other / "config.json").write_text(json.dumps(saved))
  refused(other, "was made by another version of the code: a key of its config is missing")
