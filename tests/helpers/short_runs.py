"""Runs of twelve steps on one device, which record what they did, and what tests of warm starts ask of them."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_model import host
from tiny import resolved

from switchlora_jax.data import loader
from switchlora_jax.errors import UserError
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.training import metrics, trainer, warm_start

STEPS = 12
SHAPE = dict(
  eval_every=4, checkpoint_every=STEPS, keep_checkpoints=STEPS,
  relora__restart_every=4, relora__restart_warmup_steps=2,
  galore__refresh_every=3, fira__refresh_every=3, frugal__refresh_every=3, apollo__refresh_every=3,
  apollo_mini__refresh_every=3,
)  # fmt: skip


def train(folder, name, **changes):
  """Train a run in `folder / name` and record what it did.

  Attributes:
    workdir, outcome: of the run.
    batches: (seed, step, rows) of each step.
    saved: {step: state} on the host.
    handed: of each hand-over, the (state, phase) before and after, on the host.
  """
  config, workdir = resolved(folder, devices=1, **SHAPE | changes), folder / name
  read, saved, handed = [], {}, []
  batch, save, hand_over = loader.shuffled_batch, Checkpoints.save, warm_start.hand_over

  def seen_batch(rows, *, seed, step, batch_size):
    made = batch(rows, seed=seed, step=step, batch_size=batch_size)
    read.append((seed, step, made[:]))
    return made

  def seen_hand_over(state, before, after):
    new = hand_over(state, before, after)
    handed.append(((host(state), before), (host(new), after)))
    return new

  def seen_save(self, step, state):
    saved[step] = host(state)
    save(self, step, state)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loader, "shuffled_batch", seen_batch)
    patch.setattr(Checkpoints, "save", seen_save)
    patch.setattr(warm_start, "hand_over", seen_hand_over)
    outcome = trainer.train(config, workdir)
  return SimpleNamespace(workdir=workdir, outcome=outcome, batches=read, saved=saved, handed=handed)


def lines(run, kind="loss"):
  """Return the lines of metrics.jsonl of training (`loss`) or evaluation (`val_loss`), without those of `TIMED`."""
  rows = [row for row in metrics.read(run.workdir / "metrics.jsonl") if kind in row]
  return [{name: value for name, value in row.items() if name not in metrics.TIMED} for row in rows]


_forwards = {}  # by the scale of the adapters and the kind of block, in which alone the models differ


def logits(of, state, run):
  """Logits of the first batch of a run, by the model of the phase `of`."""
  forward = jax.jit(lambda params, frozen, tokens: of.model.apply({"params": params, "frozen": frozen}, tokens))
  forward = _forwards.setdefault((of.model.block_class, of.model.dense.func, of.scale), forward)
  return np.asarray(forward(state.params, state.frozen, run.batches[0][-1]))


def refused(folder, source, sentence, **changes):
  """Check that a run from `source` ends with a `UserError` that has the sentence, before it trains."""
  options = dict(method="full", warm_start_from=str(source)) | changes
  with pytest.raises(UserError) as caught:
    train(folder, "refused", **options)
  assert sentence in str(caught.value)
  shutil.rmtree(folder / "refused")


def check_sizes_are_refused(folder, source):
  """Check that a model of other sizes than that of `source` is refused, with an array and the flags to set."""
  sentence = f"the model of --config.warm_start_from={source} has another architecture than this one"
  layers = ": blocks/attention_norm/scale is [2, 16] there and [3, 16] here"
  wanted = "; set --config.model.intermediate_size=24 --config.model.num_layers=2"
  refused(folder, source, sentence + layers + wanted, model__intermediate_size=32, model__num_layers=3)
  width = ": blocks/down/kernel is [2, 24, 16] there and [2, 32, 16] here; set --config.model.intermediate_size=24"
  refused(folder, source, sentence + width, model__intermediate_size=32, method="switchlora")
  refused(folder, source, sentence + "; set --config.model.num_heads=2", model__num_heads=4, method="lora")
