"""Validation loss: a token-weighted mean over a fixed set of rows, the same for every method."""

from functools import partial

import jax
import numpy as np

from switchlora_jax import hosts
from switchlora_jax.dataset import Batch
from switchlora_jax.metrics import progress_bar
from switchlora_jax.sharding import by_rows, replicated
from switchlora_jax.train_step import row_losses


def make_eval_step(model, mesh):
  """The jitted (params, frozen, rows [batch, length]) -> the loss of each row, [batch]."""
  everywhere, rows = replicated(mesh), by_rows(mesh)
  shardings = dict(in_shardings=(everywhere, everywhere, rows), out_shardings=everywhere)
  return jax.jit(partial(row_losses, model), **shardings)


def validation_loss(eval_step, state, rows: np.ndarray, batch_size: int, place) -> dict[str, float]:
  """{"val_loss": nats a token, "val_ppl": its exponential} over all of `rows` [n, length].

  Every process must call it; each reads the rows of its own devices and gets the same numbers.
  """
  losses = []
  with progress_bar(len(rows), what="validate", unit="row", shown=hosts.is_first()) as bar:
    for start in range(0, len(rows), batch_size):
      batch = Batch(rows, np.arange(start, start + batch_size) % len(rows))  # the last is filled up from the first rows
      count = min(batch_size, len(rows) - start)  # … and the filling left out
      losses.append(np.asarray(eval_step(state.params, state.frozen, place(batch)))[:count])
      bar.update(count)
  loss = float(np.concatenate(losses).mean(dtype=np.float64))
  with np.errstate(over="ignore"):  # a run that has diverged has an infinite perplexity, not an exception
    return {"val_loss": loss, "val_ppl": float(np.exp(loss))}
