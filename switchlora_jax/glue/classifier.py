"""Full fine-tuning of a pre-trained LLaMA for classification or regression, with a head on the last token."""

import functools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from switchlora_jax.glue.examples import Examples, LabelledBatch, epoch_batches, padded_batch
from switchlora_jax.models import Architecture, LLaMA, make_model
from switchlora_jax.models.llama import INIT
from switchlora_jax.runs.files import atomic_writer

EVAL_BATCH_SIZE = 64
ADAM = optax.scale_by_adam()  # AdamW without weight decay


class Diverged(ArithmeticError):
  """The outputs are infinite or NaN."""


class Classifier(NamedTuple):
  """Compiled functions for models of one size and one number of outputs.

  Params are plain weights, as of `switchlora_jax.models.weights`, with a `head` kernel [hidden, outputs].

  Attributes:
    step: (params, moments, LabelledBatch, learning rate) -> (params, moments, loss). One update. The first two
      arguments are donated.
    outputs: (params, tokens [batch, length], last [batch]) -> [batch, outputs] float32, at the tokens `last`.
  """

  step: Callable
  outputs: Callable


@functools.cache  # shared by all seeds, learning rates, and models of one size
def build_classifier(outputs: int, architecture: Architecture) -> Classifier:
  """Builds the classifier for a decoder, on one device.

  The computation is in bfloat16 on GPUs and in float32 elsewhere. Params are float32.

  Args:
    outputs: number of classes, or 1 for regression with a squared error.
    architecture: of the decoder; its own head is not used.
  """
  device = jax.devices()[0]
  dtypes = dict(dtype=jnp.bfloat16 if device.platform == "gpu" else jnp.float32, param_dtype=jnp.float32)
  trunk = make_model(architecture, head=False, device=device, **dtypes)
  forward = partial(last_token_outputs, trunk)
  return Classifier(jax.jit(partial(_step, forward), donate_argnums=(0, 1)), jax.jit(forward))


def with_head(weights: dict, outputs: int, seed: int) -> dict:
  """Plain weights in float32 on the device, with a new head: kernel [hidden, outputs], drawn as LLaMA's, no bias."""
  hidden = weights["norm"]["scale"].shape[-1]
  kernel = INIT(jax.random.key(seed), (hidden, outputs), jnp.float32)
  return jax.tree.map(partial(jnp.array, dtype=jnp.float32), weights | {"head": {"kernel": kernel}})


def last_token_outputs(trunk: LLaMA, params, tokens, last):
  """Outputs at the last token of each row. Because of the causal mask, padding on the right has no influence.

  Args:
    trunk: the model without its head.
    params: plain weights with a head.
    tokens: [batch, length].
    last: [batch], index of the last token.

  Returns:
    [batch, outputs] float32.
  """
  hidden = trunk.apply({"params": params}, tokens)[jnp.arange(len(tokens)), last]  # [batch, hidden]
  return jnp.matmul(hidden, params["head"]["kernel"].astype(hidden.dtype), preferred_element_type=jnp.float32)


def weighted_loss(outputs, labels, weights):
  """Weighted mean over rows, []: the squared error of a single output, else cross-entropy of the classes in nats."""
  if outputs.shape[-1] == 1:
    losses = (outputs[:, 0] - labels) ** 2
  else:
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
  return jnp.sum(losses * weights) / jnp.sum(weights)


def _step(forward, params, moments, batch: LabelledBatch, learning_rate):
  loss, grads = jax.value_and_grad(
    lambda params: weighted_loss(forward(params, batch.tokens, batch.last), batch.labels, batch.weights)
  )(params)
  updates, moments = ADAM.update(grads, moments)
  return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), moments, loss


class FineTuningPlan(NamedTuple):
  """Hyperparameters of one fine-tuning.

  Attributes:
    learning_rate: at the first step. It decays linearly to 0, without warm-up.
    epochs: passes over the training examples.
    seed: of the head and of the order of the examples.
    batch_size: examples per step.
  """

  learning_rate: float
  epochs: int
  seed: int
  batch_size: int = 16


class Fitted(NamedTuple):
  """A fine-tuned model, as of its best epoch.

  Attributes:
    params: NumPy arrays.
    outputs: [examples, outputs] of the dev examples.
    scores: score of the dev examples after each epoch.
    losses: mean loss of the training examples in each epoch.
  """

  params: dict
  outputs: np.ndarray
  scores: list[float]
  losses: list[float]


def total_steps(plan: FineTuningPlan, examples: int) -> int:
  """Number of updates of a fine-tuning on this number of examples."""
  return plan.epochs * math.ceil(examples / plan.batch_size)


def fit(classifier: Classifier, params, train: Examples, dev: Examples, score_fn, plan: FineTuningPlan, bar) -> Fitted:
  """Fine-tunes, evaluates `dev` after each epoch, and keeps the best epoch; the first one of equal scores.

  Args:
    classifier: from `build_classifier`.
    params: from `with_head`. Donated.
    train: training examples.
    dev: examples to select the epoch with.
    score_fn: outputs [examples, outputs] -> score, higher is better.
    plan: the hyperparameters.
    bar: a progress bar of `total_steps` steps.

  Raises:
    Diverged: outputs are infinite or NaN.
  """
  moments, total, step = ADAM.init(params), total_steps(plan, len(train.tokens)), 0
  best, scores, losses = None, [], []
  for epoch in range(plan.epochs):
    results = []
    for batch in epoch_batches(train, plan.batch_size, seed=plan.seed, epoch=epoch):
      params, moments, loss = classifier.step(params, moments, batch, plan.learning_rate * (1 - step / total))
      results.append((loss, batch.weights.sum()))
      step += 1
      bar.update()
    means, counts = zip(*jax.device_get(results), strict=True)
    losses.append(float(np.average(means, weights=counts)))
    outputs = compute_outputs(classifier, params, dev)
    if not np.isfinite(outputs).all():
      raise Diverged(f"outputs are not finite after epoch {epoch + 1}")
    scores.append(score_fn(outputs))
    bar.set_postfix(epoch=epoch + 1, loss=f"{losses[-1]:.3f}", score=f"{scores[-1]:.4f}")
    if best is None or scores[-1] > max(scores[:-1]):
      best = jax.device_get(params), outputs
  return Fitted(*best, scores, losses)


def compute_outputs(classifier: Classifier, params, examples: Examples) -> np.ndarray:
  """The outputs of all examples, [examples, outputs]. Batches have examples of similar length, to reduce padding."""
  order = np.argsort([len(row) for row in examples.tokens], kind="stable")
  outputs = []
  for start in range(0, len(order), EVAL_BATCH_SIZE):
    indices = order[start : start + EVAL_BATCH_SIZE]
    batch = padded_batch(examples, indices, EVAL_BATCH_SIZE)
    outputs.append(np.asarray(classifier.outputs(params, batch.tokens, batch.last))[: len(indices)])
  return np.concatenate(outputs)[np.argsort(order)]


def save_params(path: Path, params: dict):
  """Writes params as a NumPy archive, one array per tree path such as `blocks/q/kernel`. Atomic."""
  with atomic_writer(path) as file:
    np.savez(file, **flatten_dict(params, sep="/"))


def load_params(path: Path) -> dict:
  """Reads the params that `save_params` wrote."""
  with np.load(path) as arrays:
    return unflatten_dict(dict(arrays), sep="/")
