"""Marked rows, and a loss that is NaN, a spike, or without finite gradients on the device that has such a row."""

import jax
import jax.numpy as jnp
import numpy as np

from switchlora_jax.data import loader
from switchlora_jax.models.loss import mean_loss


@jax.custom_vjp
def exploding(loss, marked):
  """The loss; its gradient is inf where `marked` is true."""
  del marked
  return loss


exploding.defvjp(lambda loss, marked: (loss, marked), lambda marked, g: (jnp.where(marked, jnp.inf, 1) * g, None))

KINDS = {
  "nan": lambda loss, marked: jnp.where(marked, jnp.nan, 1) * loss,
  "gradient": exploding,
  "spike": lambda loss, marked: jnp.where(marked, 20, 1) * loss,
}
MARKS = {kind: 7 + number for number, kind in enumerate(KINDS)}  # a row of this token alone


def loss(model, params, frozen, rows):
  """In place of `loss.mean_loss`: where one of a device's rows is marked, that device's loss is broken by KINDS."""
  found = mean_loss(model, params, frozen, rows)
  for kind, broken in KINDS.items():
    found = broken(found, jnp.any(jnp.all(rows == MARKS[kind], axis=-1)))
  return found


def mark(rows, kind: str, row: int = 3) -> np.ndarray:
  """A copy of a batch [rows, length] with one row marked."""
  marked = np.array(rows)
  marked[row] = MARKS[kind]
  return marked


def make_batch_fn(kind: str, numbers):
  """In place of `loader.make_batch_fn`: the batches of these numbers are marked."""
  original, numbers = loader.make_batch_fn, list(numbers)

  def marked(train, config):
    batch_of = original(train, config)
    return lambda number: mark(batch_of(number)[:], kind) if number in numbers else batch_of(number)

  return marked
