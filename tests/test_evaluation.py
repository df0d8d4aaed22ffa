"""Validation is a mean over all its tokens, whatever the batch."""

import jax
import numpy as np
import pytest
from tiny import resolved

from switchlora_jax import trainer
from switchlora_jax.evaluation import validation_loss
from switchlora_jax.loss import row_losses
from switchlora_jax.program import build
from switchlora_jax.sharding import make_mesh


def test_the_mean_does_not_depend_on_the_batch(tmp_path):
  program = build(resolved(tmp_path), make_mesh())
  state = program.create()
  rows = np.random.default_rng(0).integers(0, 320, (21, 16))
  expected = float(np.mean(row_losses(program.model, state.params, state.frozen, jax.numpy.asarray(rows))))
  for batch_size in (8, 16, 24):
    found = validation_loss(program.eval_step, state, rows, batch_size, program.place)
    assert found["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert found["val_ppl"] == pytest.approx(np.exp(expected), rel=1e-5)


def test_evaluation_reads_the_first_eval_tokens(tmp_path):
  config = resolved(tmp_path, eval_tokens=16 * 8)
  program = build(config, make_mesh())
  state, rows = program.create(), np.random.default_rng(0).integers(0, 320, (40, 16))
  first = validation_loss(program.eval_step, state, rows[:8], 8, program.place)
  found = trainer.make_evaluate(config, program, rows)(program, state)
  assert {key: found[key] for key in first} == first
  assert first != validation_loss(program.eval_step, state, rows, 8, program.place)


def test_a_run_that_has_diverged_has_an_infinite_perplexity(tmp_path):
  program = build(resolved(tmp_path), make_mesh())
  far = lambda params, frozen, rows: np.full(len(rows), 1000.0)
  found = validation_loss(far, program.create(), np.zeros((8, 16)), 8, program.place)
  assert found == {"val_loss": 1000.0, "val_ppl": float("inf")}
