"""Validation: a token-weighted mean over a fixed set of rows, the same for every method."""

import math

import jax
import numpy as np
from jax.sharding import PartitionSpec

from switchlora_jax.data.loader import Batch
from switchlora_jax.models.loss import on_parts, row_losses
from switchlora_jax.parallel import processes
from switchlora_jax.parallel.sharding import BOTH, replicated
from switchlora_jax.training.metrics import progress_bar


def make_eval_step(model, placement, state):
  """The jitted (params, frozen, rows [batch, length]) -> the loss of each row, [batch], for states like `state`."""
  params, frozen = placement.specs(state.params, "trained"), placement.specs(state.frozen, "frozen")
  rows = PartitionSpec(BOTH)
  # Each device works on its own rows: left to the compiler, chunks of tokens would cross the devices.
  specs = dict(in_specs=(params, frozen, rows), out_specs=rows)
  losses = jax.shard_map(on_parts(row_losses, model, params, frozen), mesh=placement.mesh, **specs, check_vma=False)
  return jax.jit(losses, out_shardings=replicated(placement.mesh))


def first(rows, tokens: int):
  """The first of `rows` [n, length], together so many tokens at most; one at least."""
  return rows[: max(1, tokens // rows.shape[1])]


def validate(phase, state, rows, batch_size: int, bytes_per_token: float) -> dict[str, float]:
  """The `summary` of all of `rows` [n, length].

  Every process must call it; each reads the rows of its own devices and gets the same numbers.
  """
  losses = []
  with progress_bar(len(rows), what="validate", unit="row", shown=processes.is_first()) as bar:
    for start in range(0, len(rows), batch_size):
      batch = Batch(rows, np.arange(start, start + batch_size) % len(rows))  # the last is filled up from the first rows
      count = min(batch_size, len(rows) - start)  # … and the filling left out
      losses.append(np.asarray(phase.eval_step(state.params, state.frozen, phase.shard_batch(batch)))[:count])
      bar.update(count)
  return summary(np.concatenate(losses), bytes_per_token)


def summary(losses: np.ndarray, bytes_per_token: float) -> dict[str, float]:
  """What the losses of rows, [n] in nats a token, say together.

  Returns:
    val_loss: their mean; val_ppl: its exponential; val_bpb: bits per byte of text, which can be compared where tokens
      differ. With the suffix _se, the standard error of each: std / √n of the loss, and of the others what follows
      from it to first order. It is of the choice of rows alone, as if they were independent, which rows of one
      document are not: the true one is larger. A single row has none (NaN).
  """
  loss = float(losses.mean(dtype=np.float64))
  bits = 1 / (math.log(2) * bytes_per_token)
  with np.errstate(over="ignore", invalid="ignore"):  # a run that has diverged has infinite numbers, not an exception
    error = float(losses.std(ddof=1, dtype=np.float64) / np.sqrt(len(losses))) if len(losses) > 1 else math.nan
    perplexity = float(np.exp(loss))
    return {
      "val_loss": loss,
      "val_loss_se": error,
      "val_ppl": perplexity,
      "val_ppl_se": perplexity * error,
      "val_bpb": loss * bits,
      "val_bpb_se": error * bits,
    }
