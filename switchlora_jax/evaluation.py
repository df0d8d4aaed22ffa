"""Validation loss: a token-weighted mean over a fixed set of rows, the same for every method."""

from functools import partial

import jax
import numpy as np
from jax.sharding import PartitionSpec

from switchlora_jax.loss import row_losses
from switchlora_jax.metrics import progress_bar
from switchlora_jax.sharding import DATA, by_rows, replicated


def make_eval_step(model, mesh):
  """The jitted (params, frozen, rows [batch, length]) -> the loss of each row, [batch]."""
  # Each device works on its own rows: left to the compiler, chunks of tokens would cross the devices.
  everywhere, split = PartitionSpec(), PartitionSpec(DATA)
  specs = dict(in_specs=(everywhere, everywhere, split), out_specs=split)
  local = jax.shard_map(partial(row_losses, model), mesh=mesh, **specs, check_vma=False)
  shardings = dict(in_shardings=(replicated(mesh), replicated(mesh), by_rows(mesh)), out_shardings=replicated(mesh))
  return jax.jit(local, **shardings)


def validation_loss(eval_step, state, rows: np.ndarray, batch_size: int, place) -> dict[str, float]:
  """{"val_loss": nats a token, "val_ppl": its exponential} over all of `rows` [n, length]."""
  losses = []
  with progress_bar(len(rows), what="validate", unit="row") as bar:
    for start in range(0, len(rows), batch_size):
      batch = np.asarray(rows[start : start + batch_size], np.int32)
      full = np.resize(batch, (batch_size, batch.shape[1]))  # the last batch is filled up, and the filling left out
      losses.append(np.asarray(eval_step(state.params, state.frozen, place(full)))[: len(batch)])
      bar.update(len(batch))
  loss = float(np.concatenate(losses).mean(dtype=np.float64))
  with np.errstate(over="ignore"):  # a run that has diverged has an infinite perplexity, not an exception
    return {"val_loss": loss, "val_ppl": float(np.exp(loss))}
