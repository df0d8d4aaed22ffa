"""Rows that hurt: a loss that breaks on the device that has one, and batches with one among their rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from switchlora_jax import dataset
from switchlora_jax.loss import mean_loss

MARK = 7  # a row of this token alone


@jax.custom_vjp
def exploding(loss, hurt):
  """The loss, whose gradient is not finite where it hurts."""
  del hurt
  return loss


exploding.defvjp(lambda loss, hurt: (loss, hurt), lambda hurt, g: (jnp.where(hurt, jnp.inf, 1) * g, None))

KINDS = {
  "nan": lambda loss, hurt: jnp.where(hurt, jnp.nan, 1) * loss,
  "gradient": exploding,
  "spike": lambda loss, hurt: jnp.where(hurt, 20, 1) * loss,
}


@functools.cache  # so that tests share what they compile with it
def loss(kind: str):
  """In place of `loss.mean_loss`: where one of a device's rows is marked, that device's loss is broken by KINDS."""

  def broken(model, params, frozen, rows):
    hurt = jnp.any(jnp.all(rows == MARK, axis=-1))
    return KINDS[kind](mean_loss(model, params, frozen, rows), hurt)

  return broken


def mark(rows, row: int = 3) -> np.ndarray:
  """A copy of a batch [rows, length] with one row marked."""
  marked = np.array(rows)
  marked[row] = MARK
  return marked


def batches(numbers):
  """In place of `dataset.batches`: the batches of these numbers are marked."""
  original, numbers = dataset.batches, list(numbers)

  def marked(data, config):
    batch_of = original(data, config)
    return lambda number: mark(batch_of(number)[:]) if number in numbers else batch_of(number)

  return marked
