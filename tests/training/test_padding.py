"""Padded rows: losses, gradients and evaluations are those of the documents one by one. Runs: test_padded_runs.py."""

from functools import cache

import jax
import numpy as np
import optax
import pytest
import small_model
from stages import slowly

from switchlora_jax.config import resolve
from switchlora_jax.parallel.sharding import placement
from switchlora_jax.training.evaluation import first, token_count, validate
from switchlora_jax.training.step import accumulated_gradients

# Lengths of the documents in a batch of 16: of one token, without a target; shorter than a row of 8; and a whole row.
# The first four have only padding: all rows of one of four devices, or of one of four micro-batches.
LENGTHS = (0, 0, 0, 0, 1, 2, 5, 8, 8, 8, 5, 2, 5, 1, 8, 0)


def documents() -> list[np.ndarray]:
  """Token ids of the documents, [length] each."""
  rng = np.random.default_rng(0)
  return [rng.integers(0, 64, length).astype(np.int32) for length in LENGTHS]


def padded_rows() -> np.ndarray:
  """The documents as rows [16, 8]."""
  return np.stack([np.pad(tokens, (0, 8 - len(tokens)), constant_values=-1) for tokens in documents()])


def padded_config(devices: int = 1, **changes):
  """A small model with attention, at full rank."""
  return resolve(small_model.config("full", data__packing="pad", **changes), devices)


def double_config(devices: int = 1, **changes):
  return padded_config(devices, dtype="float64", param_dtype="float64", **changes)


@cache
def drawn_params():
  """Parameters in float64, large enough that attention and targets matter."""
  rng, params = np.random.default_rng(1), small_model.phase(double_config(), 1).abstract.params
  return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape), params)


@cache
def one_by_one():
  """(mean loss over all targets, its gradients, [documents, 2] sums and numbers of targets), without any padding."""
  model, params = small_model.model(double_config()), drawn_params()

  @jax.jit
  def total(params, tokens):
    logits = model.apply({"params": params, "frozen": {}}, tokens[None])[0, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).sum()

  gradient, sums, grads = jax.jit(jax.value_and_grad(total)), [], jax.tree.map(np.zeros_like, params)
  for tokens in documents():
    loss, grad = gradient(params, tokens) if len(tokens) > 1 else (0.0, jax.tree.map(np.zeros_like, params))
    sums.append((float(loss), max(len(tokens) - 1, 0)))
    grads = jax.tree.map(lambda total, x: total + np.asarray(x), grads, grad)
  sums = np.array(sums)
  count = sums[:, 1].sum()
  return sums[:, 0].sum() / count, jax.tree.map(lambda x: x / count, grads), sums


LAYOUTS = {
  "one device": (1, {}),
  "micro-batches": (1, dict(accumulation=4)),
  "data parallel": (4, {}),
  "micro-batches, sharded": (4, dict(accumulation=2, sharding__fsdp=2)),
}


@pytest.mark.parametrize("layout", slowly(LAYOUTS, quick=["one device", "micro-batches, sharded"]))
def test_loss_and_gradients_are_those_of_the_documents_one_by_one(layout, x64):
  """The mean over the tokens of the whole batch: a mean over rows, micro-batches or devices would be another."""
  devices, changes = LAYOUTS[layout]
  config = double_config(devices, **changes)
  mesh = small_model.mesh(devices, config.sharding.fsdp)
  phase = small_model.phase(config, devices)
  gradients = accumulated_gradients(phase.model, placement(config, mesh), phase.abstract, config.accumulation, True)
  with jax.set_mesh(mesh):
    found = jax.jit(gradients)(drawn_params(), {}, phase.shard_batch(padded_rows()))
  loss, grads, sums = one_by_one()
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), found, (loss, grads))
  assert abs(loss - np.mean(sums[sums[:, 1] > 0, 0] / sums[sums[:, 1] > 0, 1])) > 1e-3, "documents differ in length"
  assert max(np.abs(grad).max() for grad in jax.tree.leaves(grads)) > 1e-2


@pytest.mark.parametrize("batch_size", [4, 12])
def test_an_evaluation_is_that_of_the_documents_one_by_one(batch_size, x64):
  """Bits per byte are those of the tokens alone; the standard error is that of a ratio of sums, by the jackknife."""
  phase = small_model.phase(double_config(4), 4)
  state = phase.abstract._replace(params=drawn_params(), frozen={})
  found = validate(phase, state, padded_rows(), batch_size, bytes_per_token=3.0, quiet=True)
  loss, _, sums = one_by_one()
  assert found["val_loss"] == pytest.approx(loss, rel=1e-12) and found["val_ppl"] == pytest.approx(np.exp(loss))
  assert found["val_bpb"] == pytest.approx(loss / np.log(2) / 3, rel=1e-12)
  without = [np.delete(sums, n, 0).sum(0) for n in range(len(sums))]
  ratios = np.array([total / count for total, count in without])
  jackknife = np.sqrt((len(sums) - 1) * ((ratios - ratios.mean()) ** 2).mean())
  assert found["val_loss_se"] == pytest.approx(jackknife, rel=0.15)


def test_rows_of_padding_alone_do_not_divide_by_zero():
  """A step on nothing else has loss 0 and is no broken step; an evaluation of nothing is not a number."""
  config = padded_config(batch_size=4)
  phase = small_model.phase(config, 1)
  rows = np.full((4, 8), -1, np.int32)
  state, metrics = phase.step(phase.create(), phase.shard_batch(rows))
  assert (metrics["loss"], metrics["grad_norm"], metrics["tokens"], metrics["skipped"]) == (0, 0, 0, 0)
  assert metrics["padding_share"] == 1
  assert np.isnan(validate(phase, state, rows, 4, 3.0, quiet=True)["val_loss"])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(("tokens", "expected"), [(0, 1), (2, 1), (5, 2), (6, 3), (13, 3), (14, 4), (99, 4)])
def test_the_first_tokens_of_padded_rows_do_not_count_padding(tokens, expected, monkeypatch):
  """Rows of 2, 3, 1 and 8 tokens, which are counted one by one and three by three."""
  rows = np.arange(8)[None] < np.array([[2], [3], [1], [8]])
  rows = np.where(rows, 7, -1)
  for at_a_time in (1, 3, 4096):
    monkeypatch.setattr("switchlora_jax.training.evaluation.COUNTED", at_a_time)
    np.testing.assert_array_equal(first(rows, tokens, padded=True), rows[:expected])
    assert token_count(rows) == 14
