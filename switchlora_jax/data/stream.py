"""Rows that are packed while the text is read, in its order: for text that cannot be prepared.

Nothing is kept: a run that goes on reads and tokenises again what it has used. It sees the same rows as long as the
text gives the same documents in the same order. Every process reads all of the text.
"""

from pathlib import Path

import numpy as np

from switchlora_jax.data import packing, tokenizer
from switchlora_jax.data.corpus import Corpus
from switchlora_jax.errors import UserError


class Stream:
  """The rows of a text, [seq_len] each, taken a batch after another."""

  def __init__(self, parts: packing.Parts, model: Path, seq_len: int):
    self._parts, self._model, self._seq_len = parts, model, seq_len
    self._restart()

  def _restart(self):
    encoded = packing.encode(tokenizer.load_tokenizer(self._model), packing.pieces(self._parts))
    self._tokens, self._waiting, self._taken = (group.tokens for group in encoded), np.empty(0, np.int32), 0

  def batch(self, step: int, batch_size: int) -> np.ndarray:
    """The rows of a step, int32 [batch_size, seq_len]; steps are best asked for in order.

    Raises:
      UserError: the text ends before.
    """
    size = batch_size * self._seq_len
    if step * size < self._taken:
      self._restart()
    while skipped := min(step * size - self._taken, size):  # what steps before this one had, never all at once
      self._take(skipped, step)
    return self._take(size, step).reshape(batch_size, self._seq_len)

  def _take(self, count: int, step: int) -> np.ndarray:
    """The next so many tokens; `step` is what they are for."""
    found, held = [self._waiting], len(self._waiting)
    while held < count:
      found.append(self._next(step))
      held += len(found[-1])
    tokens = np.concatenate(found)
    self._taken, self._waiting = self._taken + count, tokens[count:]
    return tokens[:count]

  def _next(self, step: int) -> np.ndarray:
    tokens = next(self._tokens, None)
    if tokens is None:
      raise UserError(
        f"the text ended before step {step + 1}; a stream is not repeated: lower --config.steps, add text, or "
        "prepare it with experiments.prepare_data and set --config.data.epochs"
      )
    return tokens


def validation(text: Corpus) -> Corpus:
  """The text that validates, alone; a UserError where there is none."""
  if text.valid is None:
    raise UserError(
      "--config.data.source=stream needs text to validate on; set --config.data.eval_path, or "
      "name a dataset of the hub that has a split `validation`"
    )
  return Corpus(text.valid, None)
