"""A pre-trained LLaMA that answers a question about a text: its trunk, and a head on the last token; all is trained."""

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

from switchlora_jax.glue.examples import Batch, Examples, batch, epoch_of
from switchlora_jax.models import LLaMA, make_model
from switchlora_jax.models.llama import INIT
from switchlora_jax.runs.files import atomic_writer

EVALUATED = 64  # rows at a time
ADAM = optax.scale_by_adam()  # which AdamW is without weight decay


class Diverged(ArithmeticError):
  """The outputs are not finite any more."""


class Classifier(NamedTuple):
  """What is compiled for models of one size and one number of outputs.

  Params are plain weights, `switchlora_jax.models.weights`, whose `head` has a column an output in place of a token.

  Attributes:
    step: (params, moments, Batch, learning rate) -> (params, moments, loss), one update; takes the first two away.
    outputs: (params, tokens [batch, length], last [batch]) -> [batch, outputs] float32, read at the places `last`.
  """

  step: Callable
  outputs: Callable


@functools.cache  # a compiled step serves all seeds, learning rates, and models of one size
def build(outputs: int, **sizes: int) -> Classifier:
  """The classifier of a LLaMA's sizes; with one output it learns numbers by squared error, else classes.

  It computes in bfloat16 on GPUs, on one device, and in float32 elsewhere; params are float32.
  """
  device = jax.devices()[0]
  kinds = dict(dtype=jnp.bfloat16 if device.platform == "gpu" else jnp.float32, param_dtype=jnp.float32)
  trunk = make_model(sizes, head=False, device=device, **kinds)
  answer = partial(outputs_of, trunk)
  return Classifier(jax.jit(partial(_step, answer), donate_argnums=(0, 1)), jax.jit(answer))


def with_head(weights: dict, outputs: int, seed: int) -> dict:
  """Plain weights with a new head, drawn as LLaMA's is: kernel [hidden, outputs], no bias. Arrays of the device."""
  hidden = weights["norm"]["scale"].shape[-1]
  kernel = INIT(jax.random.key(seed), (hidden, outputs), jnp.float32)
  return jax.tree.map(partial(jnp.array, dtype=jnp.float32), weights | {"head": {"kernel": kernel}})


def outputs_of(trunk: LLaMA, params, tokens, last):
  """[batch, outputs] float32 of rows that are filled up on the right: a causal mask keeps the filling from `last`."""
  hidden = trunk.apply({"params": params}, tokens)[jnp.arange(len(tokens)), last]  # [batch, hidden]
  return jnp.matmul(hidden, params["head"]["kernel"].astype(hidden.dtype), preferred_element_type=jnp.float32)


def mean_loss(outputs, labels, weights):
  """Squared error of the one output, or cross-entropy of the classes in nats; weighted mean over rows, []."""
  if outputs.shape[-1] == 1:
    losses = (outputs[:, 0] - labels) ** 2
  else:
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
  return jnp.sum(losses * weights) / jnp.sum(weights)


def _step(answer, params, moments, rows: Batch, learning_rate):
  loss, grads = jax.value_and_grad(
    lambda params: mean_loss(answer(params, rows.tokens, rows.last), rows.labels, rows.weights)
  )(params)
  updates, moments = ADAM.update(grads, moments)
  return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), moments, loss


class Plan(NamedTuple):
  """How a model is fine-tuned: peak learning rate, passes over the rows, seed of head and order, rows a step.

  The learning rate falls linearly to 0, without a warm-up.
  """

  learning_rate: float
  epochs: int
  seed: int
  batch_size: int = 16


class Fitted(NamedTuple):
  """A fine-tuned model at the end of its best epoch.

  Attributes:
    params: NumPy arrays. outputs: of the dev rows, [rows, outputs].
    scores: of the dev rows after each epoch. losses: of each epoch's training rows, the mean.
  """

  params: dict
  outputs: np.ndarray
  scores: list[float]
  losses: list[float]


def steps_of(plan: Plan, rows: int) -> int:
  """Updates in all."""
  return plan.epochs * math.ceil(rows / plan.batch_size)


def fit(classifier: Classifier, params, train: Examples, dev: Examples, judge, plan: Plan, bar) -> Fitted:
  """Train for the plan's epochs, judging the outputs of `dev` after each; the best is kept, of equals the first.

  Args:
    params: as from `with_head`; taken away.
    judge: outputs [rows, outputs] -> a score, the higher the better.
    bar: a progress bar of `steps_of` steps.
  Raises:
    Diverged: outputs became infinite or no numbers.
  """
  moments, total, step = ADAM.init(params), steps_of(plan, len(train.tokens)), 0
  best, scores, losses = None, [], []
  for epoch in range(plan.epochs):
    seen = []
    for rows in epoch_of(train, plan.batch_size, seed=plan.seed, epoch=epoch):
      params, moments, loss = classifier.step(params, moments, rows, plan.learning_rate * (1 - step / total))
      seen.append((loss, rows.weights.sum()))
      step += 1
      bar.update()
    means, counts = zip(*jax.device_get(seen), strict=True)
    losses.append(float(np.average(means, weights=counts)))
    outputs = evaluate(classifier, params, dev)
    if not np.isfinite(outputs).all():
      raise Diverged(f"outputs are not finite after epoch {epoch + 1}")
    scores.append(judge(outputs))
    bar.set_postfix(epoch=epoch + 1, loss=f"{losses[-1]:.3f}", score=f"{scores[-1]:.4f}")
    if best is None or scores[-1] > max(scores[:-1]):
      best = jax.device_get(params), outputs
  return Fitted(*best, scores, losses)


def evaluate(classifier: Classifier, params, examples: Examples) -> np.ndarray:
  """The outputs of all examples, [rows, outputs], computed in the order of their lengths."""
  order = np.argsort([len(row) for row in examples.tokens], kind="stable")
  parts = [order[start : start + EVALUATED] for start in range(0, len(order), EVALUATED)]
  found = []
  for picks in parts:
    rows = batch(examples, picks, EVALUATED)
    found.append(np.asarray(classifier.outputs(params, rows.tokens, rows.last))[: len(picks)])
  return np.concatenate(found)[np.argsort(order)]


def save(path: Path, params: dict):
  """Write params as a NumPy archive, an array for each path: `blocks/q/kernel`; an older one is kept until then."""
  with atomic_writer(path) as file:
    np.savez(file, **flatten_dict(params, sep="/"))


def load(path: Path) -> dict:
  """The params that `save` wrote."""
  with np.load(path) as arrays:
    return unflatten_dict(dict(arrays), sep="/")
