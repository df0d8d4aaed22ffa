"""Validation loss: a token-weighted mean over a fixed set of rows, the same for every method."""

import jax
import numpy as np
from jax.sharding import PartitionSpec

from switchlora_jax import hosts
from switchlora_jax.dataset import Batch
from switchlora_jax.loss import on_parts, row_losses
from switchlora_jax.metrics import progress_bar
from switchlora_jax.sharding import BOTH, replicated


def make_eval_step(model, placement, state):
  """The jitted (params, frozen, rows [batch, length]) -> the loss of each row, [batch], for states like `state`."""
  params, frozen = placement.specs(state.params, "trained"), placement.specs(state.frozen, "frozen")
  rows = PartitionSpec(BOTH)
  # Each device works on its own rows: left to the compiler, chunks of tokens would cross the devices.
  specs = dict(in_specs=(params, frozen, rows), out_specs=rows)
  losses = jax.shard_map(on_parts(row_losses, model, params, frozen), mesh=placement.mesh, **specs, check_vma=False)
  return jax.jit(losses, out_shardings=replicated(placement.mesh))


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
