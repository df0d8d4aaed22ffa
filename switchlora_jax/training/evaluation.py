"""Validation: a token-weighted mean over a fixed set of sequences, the same for every method.

Padding, which has negative ids, is neither evaluated nor counted.
"""

import math

import jax
import numpy as np
from jax.sharding import PartitionSpec

from switchlora_jax.data.loader import Batch
from switchlora_jax.models.loss import on_parts, padded_row_losses, row_losses
from switchlora_jax.parallel import processes
from switchlora_jax.parallel.sharding import BOTH, replicated
from switchlora_jax.progress import progress_bar

COUNTED = 4096  # sequences whose tokens are counted at a time


def make_eval_step(model, placement, state, padded: bool = False):
  """The jitted evaluation step.

  Args:
    state: a train state, abstract or real, whose structure and shapes are those that will be evaluated.
    padded: whether negative ids are padding.
  Returns:
    (params, frozen, tokens [batch, length]) -> the mean loss of each sequence, [batch], in nats per token, replicated.
    If `padded`, the sum of the losses of each sequence and the number of its targets, [batch, 2].
  """
  param_specs, frozen_specs = placement.specs(state.params, "trained"), placement.specs(state.frozen, "frozen")
  sequences = PartitionSpec(BOTH)
  # Each device evaluates its own sequences: without shard_map, XLA would send chunks of tokens between devices.
  specs = dict(in_specs=(param_specs, frozen_specs, sequences), out_specs=sequences)
  losses = on_parts(padded_row_losses if padded else row_losses, model, param_specs, frozen_specs)
  losses = jax.shard_map(losses, mesh=placement.mesh, **specs, check_vma=False)
  return jax.jit(losses, out_shardings=replicated(placement.mesh))


def first(rows, tokens: int, padded: bool = False):
  """The first sequences of `rows` [n, length] that have at most `tokens` tokens in total, but at least one.

  Args:
    padded: whether negative ids are padding, which is not counted.
  """
  if not padded:
    return rows[: max(1, tokens // rows.shape[1])]
  count, total = 0, 0
  for start in range(0, len(rows), COUNTED):
    totals = total + np.cumsum((np.asarray(rows[start : start + COUNTED]) >= 0).sum(-1))
    count, total = count + int((totals <= tokens).sum()), int(totals[-1])
    if total > tokens:
      break
  return rows[: max(1, count)]


def token_count(rows) -> int:
  """Number of tokens in `rows` [n, length] that are not padding (negative)."""
  parts = (np.asarray(rows[start : start + COUNTED]) for start in range(0, len(rows), COUNTED))
  return sum(int((part >= 0).sum()) for part in parts)


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
  found = np.concatenate(losses)
  return summary(found, bytes_per_token) if found.ndim == 1 else summary(found[:, 0], bytes_per_token, found[:, 1])


def summary(losses: np.ndarray, bytes_per_token: float, counts: np.ndarray | None = None) -> dict[str, float]:
  """Validation metrics from the losses of sequences.

  Args:
    losses: [n], mean loss of each sequence in nats per token.
    bytes_per_token: bytes of validation text per token.
    counts: [n], numbers of targets, if sequences differ in them; `losses` are then sums over the targets.
  Returns:
    val_loss: the mean loss.
    val_ppl: its exponential, the perplexity.
    val_bpb: bits per byte of text, which is comparable across tokenizers.
    val_loss_se, val_ppl_se, val_bpb_se: standard errors. That of the loss is std / √n, or with `counts` that of a
      ratio of two means; the others follow to first order. They assume independent sequences. Sequences of one document
      are not independent, so the true standard errors are larger. NaN for a single sequence.
  """
  bits = 1 / (math.log(2) * bytes_per_token)
  with np.errstate(over="ignore", invalid="ignore"):  # a diverged run has infinite metrics, not an exception
    if counts is None:
      loss, deviations = float(losses.mean(dtype=np.float64)), losses
    else:
      counts = counts.astype(np.float64)
      loss = float(losses.sum(dtype=np.float64) / counts.sum())  # NaN if there is no target
      deviations = (losses - loss * counts) / counts.mean()
    error = float(deviations.std(ddof=1, dtype=np.float64) / np.sqrt(len(losses))) if len(losses) > 1 else math.nan
    perplexity = float(np.exp(loss))
    return {
      "val_loss": loss,
      "val_loss_se": error,
      "val_ppl": perplexity,
      "val_ppl_se": perplexity * error,
      "val_bpb": loss * bits,
      "val_bpb_se": error * bits,
    }


def add_further(values: dict[str, float], label: str, found: dict[str, float]) -> None:
  """Add the metrics `found` of a further validation text to `values`, each as `METRIC/LABEL`."""
  values.update({f"{name}/{label}": value for name, value in found.items()})


def further(row: dict, metric: str = "val_ppl") -> dict[str, float | None]:
  """{label: value} of a metric of the further validation texts in an evaluation's row of metrics.jsonl."""
  return {name.partition("/")[2]: value for name, value in row.items() if name.startswith(f"{metric}/")}


def describe_perplexities(row: dict) -> str:
  """`validation perplexity 40.72; old 41.30`, of an evaluation's row of metrics.jsonl."""
  shown = lambda value: "not finite" if value is None else f"{value:.2f}"
  others = "".join(f"; {label} {shown(value)}" for label, value in further(row).items())
  return f"validation perplexity {shown(row['val_ppl'])}{others}"
