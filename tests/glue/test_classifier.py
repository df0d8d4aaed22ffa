from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import host, same_bits

from switchlora_jax.glue import classifier
from switchlora_jax.glue.classifier import (
  FineTuningPlan,
  build_classifier,
  compute_outputs,
  fit,
  weighted_loss,
  with_head,
)
from switchlora_jax.glue.examples import Examples, LabelledBatch, padded_batch
from switchlora_jax.models import architecture_of, make_model
from switchlora_jax.progress import progress_bar

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
ARCHITECTURE = architecture_of(SIZES)
MODEL = make_model(ARCHITECTURE, partial(nn.Dense, use_bias=False))  # its kernels start larger than in training
MARK = 5  # the token that only examples of class 1 contain


@pytest.fixture(scope="module")
def weights():
  return host(MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])


def toy_examples(count: int, seed: int, longest: int = 12) -> Examples:
  """Examples of random tokens, of class 1 if they contain `MARK`."""
  random = np.random.default_rng(seed)
  labels = random.integers(0, 2, count).astype(np.int32)
  tokens = [random.integers(MARK + 1, 32, random.integers(2, longest)).astype(np.int32) for _ in labels]
  for row, label in zip(tokens, labels, strict=True):
    if label:
      row[random.integers(len(row))] = MARK
  return Examples(tokens, labels)


def accuracy(dev):
  return lambda outputs: float(np.mean(outputs.argmax(-1) == dev.labels))


def fit_classifier(weights, train, dev, score_fn=None, outputs=2, **plan):
  plan = FineTuningPlan(**(dict(learning_rate=1e-2, epochs=3, seed=0) | plan))
  bar = progress_bar(shown=False)
  params = with_head(weights, outputs, plan.seed)
  return fit(build_classifier(outputs, ARCHITECTURE), params, train, dev, score_fn or accuracy(dev), plan, bar)


# --- outputs --------------------------------------------------------------------------------------------------------


def test_the_trunk_is_the_pre_trained_model(weights):
  """With the head of pre-training, the outputs are next-token logits."""
  rows = padded_batch(toy_examples(6, 0), np.arange(6), 6)
  logits = MODEL.apply({"params": weights}, rows.tokens)[np.arange(6), rows.last]
  np.testing.assert_allclose(
    build_classifier(2, ARCHITECTURE).outputs(weights, rows.tokens, rows.last), logits, rtol=1e-5, atol=1e-6
  )


def test_outputs_do_not_depend_on_padding(weights):
  params, outputs = with_head(weights, 3, 0), build_classifier(3, ARCHITECTURE).outputs
  row = toy_examples(1, 1).tokens[0]
  last = np.array([len(row) - 1], np.int32)
  filled = np.full((1, 64), 7, np.int32)
  filled[0, : len(row)] = row
  zeros = np.pad(row, (0, 64 - len(row)))[None]
  assert same_bits(outputs(params, zeros, last), outputs(params, filled, last))
  np.testing.assert_allclose(outputs(params, zeros[:, :16], last), outputs(params, zeros, last), rtol=1e-5, atol=1e-6)
  assert not np.allclose(outputs(params, zeros, last), outputs(params, filled, last + 1), atol=1e-3)


def test_outputs_do_not_depend_on_other_examples(weights):
  params, examples = with_head(weights, 2, 0), toy_examples(70, 2, longest=40)
  together = compute_outputs(build_classifier(2, ARCHITECTURE), params, examples)
  assert together.shape == (70, 2)
  for number in (0, 33, 69):
    alone = compute_outputs(
      build_classifier(2, ARCHITECTURE), params, Examples([examples.tokens[number]], examples.labels[[number]])
    )
    np.testing.assert_allclose(together[number], alone[0], rtol=1e-5, atol=1e-6)


def test_the_seed_determines_the_head(weights):
  heads = [with_head(weights, 400, seed)["head"]["kernel"] for seed in (0, 0, 1)]
  assert heads[0].shape == (16, 400) and same_bits(heads[0], heads[1]) and not same_bits(heads[0], heads[2])
  assert float(jnp.std(heads[0])) == pytest.approx(0.02, rel=0.05)
  assert same_bits(with_head(weights, 2, 0)["blocks"], weights["blocks"])


# --- loss and step --------------------------------------------------------------------------------------------------


def test_weighted_loss_matches_hand_computed_values():
  logits, labels = np.array([[0.0, np.log(3)], [0.0, 0.0], [5.0, 5.0]]), np.array([1, 0, 0])
  mean = weighted_loss(jnp.array(logits), jnp.array(labels), jnp.array([1.0, 1, 0]))
  assert float(mean) == pytest.approx((np.log(4 / 3) + np.log(2)) / 2)
  numbers = weighted_loss(jnp.array([[1.0], [2.0], [9.0]]), jnp.array([0.0, 4, 0]), jnp.array([1.0, 1, 0]))
  assert float(numbers) == pytest.approx((1 + 4) / 2)


def test_a_step_is_adamw_without_decay_on_the_examples_without_padding(weights):
  params, rows = with_head(weights, 2, 0), padded_batch(toy_examples(5, 3), np.arange(5), 5)
  tx = optax.adamw(1e-2, weight_decay=0.0)
  trunk = MODEL.clone(head=False)

  @jax.jit
  def gradient(params):
    outputs = lambda p: classifier.last_token_outputs(trunk, p, rows.tokens, rows.last)
    return jax.grad(lambda p: weighted_loss(outputs(p), rows.labels, rows.weights))(params)

  expected, state = params, tx.init(params)
  for _ in range(2):
    updates, state = tx.update(gradient(expected), state, expected)
    expected = optax.apply_updates(expected, updates)
  expected = host(expected)
  found, moments = with_head(weights, 2, 0), classifier.ADAM.init(params)
  filled = padded_batch(toy_examples(5, 3), np.arange(5), 16)
  for _ in range(2):
    found, moments, _ = build_classifier(2, ARCHITECTURE).step(found, moments, filled, 1e-2)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), host(found), expected)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), expected, host(with_head(weights, 2, 0)))
  assert min(jax.tree.leaves(moved)) > 1e-3  # every array is trained


def test_seeds_and_learning_rates_share_a_compiled_step(weights):
  built = build_classifier(2, ARCHITECTURE)
  assert build_classifier(2, ARCHITECTURE) is built and build_classifier(1, ARCHITECTURE) is not built
  fit_classifier(weights, toy_examples(20, 4), toy_examples(5, 5), epochs=1)
  count = built.step._cache_size()
  fit_classifier(weights, toy_examples(20, 4), toy_examples(5, 5), epochs=2, seed=3, learning_rate=1e-3)
  assert built.step._cache_size() == count


# --- training -------------------------------------------------------------------------------------------------------


def test_a_toy_task_is_learnt_and_shuffled_labels_are_not(weights):
  train, dev = toy_examples(400, 6), toy_examples(200, 7)
  good = fit_classifier(weights, train, dev, epochs=8)
  assert good.losses[-1] < 0.5 * good.losses[0] and max(good.scores) > 0.9
  mixed = train._replace(labels=np.random.default_rng(0).permutation(train.labels))
  assert max(fit_classifier(weights, mixed, dev, epochs=8).scores) < 0.7


def test_a_regression_task_is_learnt(weights):
  numbers = lambda examples: examples._replace(labels=(1 + 3 * examples.labels).astype(np.float32))
  train, dev = numbers(toy_examples(400, 6)), numbers(toy_examples(200, 7))
  score_fn = lambda outputs: float(np.corrcoef(outputs[:, 0], dev.labels)[0, 1])
  assert max(fit_classifier(weights, train, dev, score_fn, outputs=1, epochs=8).scores) > 0.8


def test_the_seed_determines_the_run(weights):
  runs = [fit_classifier(weights, toy_examples(40, 8), toy_examples(10, 9), seed=seed) for seed in (0, 0, 1)]
  assert same_bits(runs[0].params, runs[1].params) and runs[0].losses == runs[1].losses
  assert runs[0].losses != runs[2].losses and not same_bits(runs[0].params["blocks"], runs[2].params["blocks"])


@pytest.mark.parametrize(("scores", "best"), [([0.1, 0.7, 0.3], 1), ([0.7, 0.7, 0.1], 0), ([-0.3, -0.2, -0.1], 2)])
def test_the_best_epoch_is_kept(weights, scores, best):
  dev, seen = toy_examples(10, 9), []

  def score_fn(outputs):
    seen.append(outputs)
    return scores[len(seen) - 1]

  found = fit_classifier(weights, toy_examples(40, 8), dev, score_fn)
  assert found.scores == scores and same_bits(found.outputs, seen[best])
  assert not same_bits(found.outputs, seen[best - 1])
  assert same_bits(compute_outputs(build_classifier(2, ARCHITECTURE), found.params, dev), found.outputs)


def test_the_learning_rate_decays_linearly_to_0(weights):
  rates, losses = [], iter([1.0, 2.0, 3.0, 4.0])

  def step(params, moments, rows: LabelledBatch, learning_rate):
    rates.append(learning_rate)
    return params, moments, next(losses)

  stub = build_classifier(2, ARCHITECTURE)._replace(step=step)
  plan, dev = FineTuningPlan(learning_rate=0.8, epochs=2, seed=0), toy_examples(4, 1)
  found = fit(stub, with_head(weights, 2, 0), toy_examples(20, 0), dev, accuracy(dev), plan, progress_bar(shown=False))
  assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2])
  assert classifier.total_steps(plan, 20) == 4
  assert found.losses == pytest.approx([(16 * 1 + 4 * 2) / 20, (16 * 3 + 4 * 4) / 20])  # the mean over rows


def test_a_diverging_run_raises(weights):
  with pytest.raises(classifier.Diverged, match="not finite after epoch 1"):
    fit_classifier(weights, toy_examples(40, 8), toy_examples(10, 9), learning_rate=1e38)


def test_saved_params_are_read_back(weights, tmp_path):
  params = host(with_head(weights, 2, 0))
  classifier.save_params(tmp_path / "best.npz", params)
  assert same_bits(classifier.load_params(tmp_path / "best.npz"), params)


def test_a_failed_save_keeps_the_previous_params(weights, tmp_path, monkeypatch):
  params = host(with_head(weights, 2, 0))
  classifier.save_params(tmp_path / "best.npz", params)

  def fail(file, **_):
    file.write(b"half")
    raise OSError("the disk is full")

  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(OSError, match="full"):
    classifier.save_params(tmp_path / "best.npz", params)
  assert same_bits(classifier.load_params(tmp_path / "best.npz"), params)
