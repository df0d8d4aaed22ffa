"""Validation: a token-weighted mean over a fixed set of sequences, the same for every method."""

import math

import jax
import numpy as np
from jax.sharding import PartitionSpec

from switchlora_jax.data.loader import Batch
from switchlora_jax.models.loss import on_parts, row_losses
from switchlora_jax.parallel import processes
from switchlora_jax.parallel.sharding import BOTH, replicated
from switchlora_jax.progress import progress_bar


def make_eval_step(model, placement, state):
  """The jitted evaluation step.

  Args:
    state: a train state, abstract or real, whose structure and shapes are those that will be evaluated.
  Returns:
    (params, frozen, tokens [batch, length]) -> the mean loss of each sequence, [batch], in nats per token, replicated.
  """
  param_specs, frozen_specs = placement.specs(state.params, "trained"), placement.specs(state.frozen, "frozen")
  sequences = PartitionSpec(BOTH)
  # Each device evaluates its own sequences: without shard_map, XLA would send chunks of tokens between devices.
  specs = dict(in_specs=(param_specs, frozen_specs, sequences), out_specs=sequences)
  losses = on_parts(row_losses, model, param_specs, frozen_specs)
  losses = jax.shard_map(losses, mesh=placement.mesh, **specs, check_vma=False)
  return jax.jit(losses, out_shardings=replicated(placement.mesh))


def first(rows, tokens: int):
  """The first sequences of `rows` [n, length] that have at most `tokens` tokens in total, but at least one."""
  return rows[: max(1, tokens // rows.shape[1])]


def validate(phase, state, rows, batch_size: int, bytes_per_token: float, quiet: bool = False) -> dict[str, float]:
  """Evaluate a state on all sequences of `rows` [n, length], and show the progress unless `quiet`.

  Every process must call it. Each reads the sequences of its own devices, and all return the same metrics.

  Returns:
    The metrics of `summary`.
  """
  losses = []
  shown = processes.is_first() and not quiet
  with progress_bar(total=len(rows), desc="validate", unit="row", shown=shown) as bar:
    for start in range(0, len(rows), batch_size):
      # The last batch is filled up with the first sequences, whose losses are dropped.
      batch = Batch(rows, np.arange(start, start + batch_size) % len(rows))
      count = min(batch_size, len(rows) - start)
      losses.append(np.asarray(phase.eval_step(state.params, state.frozen, phase.shard_batch(batch)))[:count])
      bar.update(count)
  return summary(np.concatenate(losses), bytes_per_token)


def summary(losses: np.ndarray, bytes_per_token: float) -> dict[str, float]:
  """Validation metrics from the losses of sequences.

  Args:
    losses: [n], mean loss of each sequence in nats per token.
    bytes_per_token: bytes of validation text per token.
  Returns:
    val_loss: the mean loss.
    val_ppl: its exponential, the perplexity.
    val_bpb: bits per byte of text, which is comparable across tokenizers.
    val_loss_se, val_ppl_se, val_bpb_se: standard errors. That of the loss is std / √n, the others follow to first
      order. They assume independent sequences. Sequences of one document are not independent, so the true standard
      errors are larger. NaN for a single sequence.
  """
  loss = float(losses.mean(dtype=np.float64))
  bits = 1 / (math.log(2) * bytes_per_token)
  with np.errstate(over="ignore", invalid="ignore"):  # a diverged run has infinite metrics, not an exception
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
