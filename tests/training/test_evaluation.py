"""Validation: a mean over all tokens, independent of the batch size, and its standard error."""

import math

import jax
import numpy as np
import pytest
import sentencepiece
from tiny import resolved

from switchlora_jax.data import tokenizer
from switchlora_jax.data.dataset import Dataset
from switchlora_jax.models.loss import row_losses
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.training import trainer
from switchlora_jax.training.evaluation import first, summary, validate
from switchlora_jax.training.phases import build_phase

pytestmark = pytest.mark.two_linear_layers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """(phase, state) of a small model."""
  phase = build_phase(resolved(tmp_path_factory.mktemp("text")), make_mesh())
  return phase, phase.create()


def test_the_mean_does_not_depend_on_the_batch(model):
  phase, state = model
  rows = np.random.default_rng(0).integers(0, 320, (21, 16))
  losses = np.asarray(row_losses(phase.model, state.params, state.frozen, jax.numpy.asarray(rows)))
  expected = summary(losses, bytes_per_token=3.0)
  for batch_size in (8, 16, 24):
    found = validate(phase, state, rows, batch_size, bytes_per_token=3.0)
    assert found == pytest.approx(expected, rel=1e-5) and found["val_loss"] == pytest.approx(losses.mean(), rel=1e-6)


def test_evaluation_reads_the_first_eval_tokens(model, tmp_path, monkeypatch):
  config, (phase, state) = resolved(tmp_path, eval_tokens=16 * 8), model
  monkeypatch.setattr(trainer, "make_learnt_rank", lambda _: lambda *_: 0.0)
  rows = np.random.default_rng(0).integers(0, 320, (40, 16))
  expected = validate(phase, state, rows[:8], 8, 3.0)
  data = Dataset(train=None, valid=rows, tokenizer_path="", fingerprint="", bytes_per_token=3.0, summary={})
  found = trainer.make_evaluate(config, phase, data)(phase, state)
  assert {key: found[key] for key in expected} == expected
  assert expected != validate(phase, state, rows, 8, 3.0)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (16, 1), (31, 1), (32, 2), (10_000, 5)])
def test_the_first_tokens_are_complete_rows_and_at_least_one(tokens, expected):
  rows = np.arange(5 * 16).reshape(5, 16)
  np.testing.assert_array_equal(first(rows, tokens), rows[:expected])


def test_a_run_that_has_diverged_has_an_infinite_perplexity(model):
  phase, state = model
  diverged = phase._replace(eval_step=lambda params, frozen, rows: np.full(len(rows), 1000.0))
  found = validate(diverged, state, np.zeros((8, 16)), 8, bytes_per_token=2.0)
  assert (found["val_loss"], found["val_ppl"], found["val_loss_se"]) == (1000.0, math.inf, 0.0)
  assert summary(np.array([1.0, math.inf]), 1.0)["val_bpb"] == math.inf


# --- the standard error -------------------------------------------------------------------------------------------


def test_the_standard_error_is_that_of_a_mean():
  losses = np.random.default_rng(1).normal(3.5, 0.4, 50).astype(np.float32)
  found = summary(losses, bytes_per_token=3.0)
  mean = sum(map(float, losses)) / 50
  error = math.sqrt(sum((x - mean) ** 2 for x in map(float, losses)) / 49) / math.sqrt(50)
  assert found["val_loss_se"] == pytest.approx(error, rel=1e-12)
  assert found["val_bpb_se"] / found["val_bpb"] == pytest.approx(error / mean, rel=1e-12)
  nearby = [summary(losses + change, 3.0)["val_ppl"] for change in (-error, error)]
  assert found["val_ppl_se"] == pytest.approx((nearby[1] - nearby[0]) / 2, rel=1e-2), "to first order"


def test_the_standard_error_is_the_scatter_of_samples():
  """Means of 2,000 samples of 40 rows. Their scatter is known to 1/√4000 = 1.6%."""
  samples = np.random.default_rng(2).exponential(1.0, (2000, 40))
  found = [summary(sample, 1.0) for sample in samples]
  scatter = np.std([each["val_loss"] for each in found], ddof=1)
  assert np.sqrt(np.mean([each["val_loss_se"] ** 2 for each in found])) == pytest.approx(scatter, rel=0.06)


def test_one_row_has_no_standard_error():
  found = summary(np.array([2.0]), 3.0)
  assert found["val_loss"] == 2.0 and all(math.isnan(found[f"val_{name}_se"]) for name in ("loss", "ppl", "bpb"))


# --- bits per byte ------------------------------------------------------------------------------------------------


def test_a_uniform_guess_among_bytes_is_8_bits_per_byte():
  """A token of b bytes, with all byte values equally likely, has a loss of ln 256^b nats."""
  for size in (1.0, 2.5, 4.0):
    found = summary(np.full(3, size * math.log(256)), bytes_per_token=size)
    assert found["val_bpb"] == pytest.approx(8, rel=1e-12)


def test_bits_per_byte_do_not_depend_on_the_tokenizer_but_perplexities_do(tmp_path):
  """One model of a text, the frequencies of its letters, is evaluated on the tokens of two tokenizers."""
  text = " ".join(f"{i} apples and {i * 7} pears lie under tree number {i % 13}" for i in range(3000))
  letters, counts = np.unique(list(text), return_counts=True)
  nats = dict(zip(letters, -np.log(counts / counts.sum()), strict=True))
  found = {}
  for size in (290, 2000):
    tokenizer.train_tokenizer([text], size, tmp_path / f"{size}.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / f"{size}.model")).encode(text, out_type=str)
    losses = np.array([sum(nats[letter] for letter in piece.replace("▁", " ")) for piece in pieces])
    found[size] = summary(losses, bytes_per_token=len(text.encode()) / len(pieces))
  small, large = found.values()
  assert large["val_ppl"] > 3 * small["val_ppl"]
  assert large["val_bpb"] == pytest.approx(small["val_bpb"], rel=1e-9)
