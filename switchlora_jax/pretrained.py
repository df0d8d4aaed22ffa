"""A model that was trained before, as plain weights: what export, generation, fine-tuning and analysis start from."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from switchlora_jax import run_directory, weights
from switchlora_jax.checkpoint import Checkpoints
from switchlora_jax.errors import UserError
from switchlora_jax.program import phases, trained_by
from switchlora_jax.sharding import make_mesh


class Pretrained(NamedTuple):
  """A model's function, whatever method trained it.

  Attributes:
    sizes: vocab_size, hidden_size, intermediate_size, num_layers, num_heads.
    weights: the `params` of the full-rank model, adapters merged in; NumPy arrays, float32 (float64 if stored so).
    tokenizer: the SentencePiece model of its tokens.
    origin: what it is, for messages: `runs/tiny, switchlora, step 1000`.
  """

  sizes: dict[str, int]
  weights: dict
  tokenizer: Path
  origin: str


def load_run(directory: Path) -> Pretrained:
  """The model of a run's newest good checkpoint, read on one device.

  Raises:
    UserError: no run lies there, or it has no checkpoint yet.
  """
  saved = run_directory.read(directory)
  tokenizer, checkpoints = directory / "tokenizer.model", directory / "checkpoints"
  if saved is None or not tokenizer.exists():
    raise UserError(f"{directory} must be the directory of a run; it has no config.json and tokenizer.model")
  config = FrozenConfigDict(
    saved["config"] | {"sharding": saved["config"]["sharding"] | {"fsdp": 1, "frozen": "replicated"}}
  )
  programs = phases(config, make_mesh(jax.devices()[:1]))
  with Checkpoints(checkpoints) as saves:
    state = saves.restore(lambda number: trained_by(programs, number).abstract)
  if state is None:
    raise UserError(f"the run in {directory} has saved no checkpoint yet; let it train longer")
  scale = trained_by(programs, int(state.step)).scale
  plain = jax.jit(lambda params, frozen: weights.merged(params, frozen, scale))(state.params, state.frozen)
  wide = lambda x: np.asarray(x, np.promote_types(x.dtype, np.float32))
  origin = f"{directory}, {config.method}, step {int(state.step)}"
  return Pretrained(dict(config.model), jax.tree.map(wide, plain), tokenizer, origin)
