"""A model that was trained before, as plain weights: what export, generation, fine-tuning and analysis start from."""

import contextlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import FrozenConfigDict

from switchlora_jax.data.tokenizer import load_tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.interop import huggingface, saved_run, tokenizer_json
from switchlora_jax.lowrank.kernel_storage import KERNEL, frozen_layers
from switchlora_jax.methods.base import TrainState
from switchlora_jax.models import weights
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.training.phases import Phase


class Pretrained(NamedTuple):
  """A model's function, whatever method trained it.

  Attributes:
    sizes: vocab_size, hidden_size, intermediate_size, num_layers, num_heads.
    weights: the `params` of the full-rank model, adapters merged in; NumPy arrays, float32 (float64 if stored so).
    tokenizer: the SentencePiece model of its tokens; None where a Hugging Face folder has none.
    origin: what it is, for messages: `runs/tiny, switchlora, step 1000 of 2000`.
    seq_len: tokens of the rows that it was trained on.
    method: that trained it; None where a Hugging Face folder does not say.
    prefix: token ids that stood before every text in training, as those of LLaMA 1 begin with BOS; ours have none.
  """

  sizes: dict[str, int]
  weights: dict
  tokenizer: Path | None
  origin: str
  seq_len: int
  method: str | None
  prefix: tuple[int, ...] = ()


class Run(NamedTuple):
  """A run's newest good checkpoint on one device, to be computed in float32 (float64 if stored so).

  Attributes:
    directory: of the run. config: its config, but for the layout and `dtype`.
    program: of the phase in which it was saved. state: what was saved, its weights alone.
  """

  directory: Path
  config: FrozenConfigDict
  phase: Phase
  state: TrainState


def load(path: Path) -> Pretrained:
  """The model in the directory of a run, or in a Hugging Face LLaMA folder with the SentencePiece file of its tokens.

  Raises:
    UserError: it is neither, or cannot be read; says why.
  """
  if huggingface.is_folder(path):
    model = load_folder(path)
    _check_tokenizer(path, model)
    return model
  if run_directory.read(path) is None:
    raise UserError(
      f"{path} must be the directory of a run that has saved a checkpoint, or a Hugging Face LLaMA folder "
      f"(config.json, model.safetensors); it is neither"
    )
  return load_run(path)


def _check_tokenizer(path: Path, model: Pretrained):
  """Raise `UserError` unless a folder has a tokenizer, all of whose ids the model knows: others would give NaN."""
  if model.tokenizer is None:
    raise UserError(f"{path} must hold {huggingface.TOKENIZER}, the SentencePiece file of its token ids; put it there")
  pieces, embeddings = load_tokenizer(model.tokenizer).get_piece_size(), model.sizes["vocab_size"]
  if pieces > embeddings:
    raise UserError(
      f"the tokenizer in {path} must fit in the model's vocabulary (={embeddings}); it has {pieces} pieces; "
      "put the one there that the model was trained with"
    )


def load_folder(path: Path) -> Pretrained:
  """The model in a Hugging Face LLaMA folder; see `huggingface.inspect` for the errors."""
  folder = huggingface.inspect(path)
  weights, prefix = huggingface.read(folder), tokenizer_json.prefix(path)
  return Pretrained(folder.sizes, weights, folder.tokenizer, str(path), folder.seq_len, None, prefix)


def load_run(directory: Path) -> Pretrained:
  """The model of a run's newest good checkpoint; see `open_run` for the errors."""
  return merge(open_run(directory))


def open_run(directory: Path) -> Run:
  """A run's newest good checkpoint; see `saved_run` for the errors."""
  saved = saved_run.open_run(directory).alone()
  with saved_run.keys_of(saved):
    dtype = "float64" if saved.config.param_dtype == "float64" else "float32"
  config = FrozenConfigDict(saved.config.to_dict() | {"dtype": dtype})
  with exactly(config.param_dtype):
    phase, state = saved_run.restore(saved._replace(config=config), None, make_mesh(jax.devices()[:1]))
  return Run(directory, config, phase, state)


def merge(run: Run) -> Pretrained:
  """The function of a run as plain weights, merged in float32 or wider.

  Where kernels are stored in 16 bits and a tail, the tail is left out, as the forward pass of training leaves it out.
  """
  frozen = unflatten_dict({(*path, KERNEL): base[KERNEL] for path, base in frozen_layers(run.state.frozen).items()})
  wide = partial(jax.tree.map, lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)))
  with exactly(run.config.param_dtype):
    merged = jax.jit(lambda params, frozen: weights.merged(wide(params), wide(frozen), run.phase.scale))
    plain = jax.tree.map(np.asarray, merged(run.state.params, frozen))
  origin = f"{run.directory}, {run.config.method}, step {int(run.state.step)} of {run.config.steps}"
  config, tokenizer = run.config, run.directory / "tokenizer.model"
  return Pretrained(dict(config.model), plain, tokenizer, origin, config.seq_len, config.method)


@contextlib.contextmanager
def exactly(param_dtype: str):
  """float64 where a run is stored so, and products of float32 in float32, which GPUs would round before."""
  wide = jax.config.jax_enable_x64 or param_dtype == "float64"
  with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
    yield
