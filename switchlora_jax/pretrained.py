"""A model that was trained before, as plain weights: what export, generation, fine-tuning and analysis start from."""

import contextlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import FrozenConfigDict

from switchlora_jax import huggingface, run_directory, weights
from switchlora_jax.checkpoint import Checkpoints
from switchlora_jax.errors import UserError
from switchlora_jax.llama import LLaMA
from switchlora_jax.program import Program, phases, trained_by
from switchlora_jax.sharding import make_mesh
from switchlora_jax.split_float import KERNEL, bases
from switchlora_jax.train_state import TrainState


class Pretrained(NamedTuple):
  """A model's function, whatever method trained it.

  Attributes:
    sizes: vocab_size, hidden_size, intermediate_size, num_layers, num_heads.
    weights: the `params` of the full-rank model, adapters merged in; NumPy arrays, float32 (float64 if stored so).
    tokenizer: the SentencePiece model of its tokens; None where a Hugging Face folder has none.
    origin: what it is, for messages: `runs/tiny, switchlora, step 1000 of 2000`.
    seq_len: tokens of the rows that it was trained on.
  """

  sizes: dict[str, int]
  weights: dict
  tokenizer: Path | None
  origin: str
  seq_len: int


class Run(NamedTuple):
  """A run's newest good checkpoint on one device, to be computed in float32 (float64 if stored so).

  Attributes:
    directory: of the run. config: its config, but for the layout and `dtype`.
    program: of the phase in which it was saved. state: what was saved.
  """

  directory: Path
  config: FrozenConfigDict
  program: Program
  state: TrainState


def load(path: Path) -> Pretrained:
  """The model in the directory of a run or in a Hugging Face LLaMA folder.

  Raises:
    UserError: it is neither, or cannot be read; says why.
  """
  return load_folder(path) if huggingface.is_folder(path) else load_run(path)


def load_folder(path: Path) -> Pretrained:
  """The model in a Hugging Face LLaMA folder; see `huggingface.inspect` for the errors."""
  folder = huggingface.inspect(path)
  return Pretrained(folder.sizes, huggingface.read(folder), folder.tokenizer, str(path), folder.seq_len)


def load_run(directory: Path) -> Pretrained:
  """The model of a run's newest good checkpoint; see `open_run` for the errors."""
  return merge(open_run(directory))


def open_run(directory: Path) -> Run:
  """A run's newest good checkpoint.

  Raises:
    UserError: no run lies there, it is of other code, or it has no checkpoint yet.
  """
  config = _config(directory)
  with exactly(config.param_dtype):
    programs = _programs(directory, config)
    with Checkpoints(directory / "checkpoints") as saves:
      state = saves.restore(lambda number: trained_by(programs, number).abstract)
  if state is None:
    raise UserError(f"the run in {directory} has saved no checkpoint yet; let it train longer")
  return Run(directory, config, trained_by(programs, int(state.step)), state)


def merge(run: Run) -> Pretrained:
  """The function of a run as plain weights, merged in float32 or wider.

  Where kernels are stored in 16 bits and a tail, the tail is left out, as the forward pass of training leaves it out.
  """
  frozen = unflatten_dict({(*path, KERNEL): base[KERNEL] for path, base in bases(run.state.frozen).items()})
  wide = partial(jax.tree.map, lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)))
  with exactly(run.config.param_dtype):
    merged = jax.jit(lambda params, frozen: weights.merged(wide(params), wide(frozen), run.program.scale))
    plain = jax.tree.map(np.asarray, merged(run.state.params, frozen))
  origin = f"{run.directory}, {run.config.method}, step {int(run.state.step)} of {run.config.steps}"
  return Pretrained(dict(run.config.model), plain, run.directory / "tokenizer.model", origin, run.config.seq_len)


def plain_model(sizes: dict[str, int], dtype=jnp.float32) -> LLaMA:
  """The model whose `params` are plain weights."""
  kinds = dict(dtype=dtype, param_dtype=dtype)
  return LLaMA(**sizes, dense=partial(nn.Dense, use_bias=False, **kinds), **kinds)


@contextlib.contextmanager
def exactly(param_dtype: str):
  """float64 where a run is stored so, and products of float32 in float32, which GPUs would round before."""
  wide = jax.config.jax_enable_x64 or param_dtype == "float64"
  with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
    yield


def _config(directory: Path) -> FrozenConfigDict:
  """The config of the run in a directory, on one device and in the dtype that it is to be read in."""
  saved = run_directory.read(directory)
  if saved is None or not all((directory / part).exists() for part in ("tokenizer.model", "checkpoints")):
    raise UserError(
      f"{directory} must be the directory of a run that has saved a checkpoint (config.json, tokenizer.model, "
      f"checkpoints/) or a Hugging Face LLaMA folder (config.json, model.safetensors); it is neither"
    )
  try:
    config = saved["config"]
    alone = {"sharding": config["sharding"] | {"fsdp": 1, "frozen": "replicated"}}
    dtype = "float64" if config["param_dtype"] == "float64" else "float32"
  except (KeyError, TypeError) as error:
    raise _foreign(directory, error) from error
  return FrozenConfigDict(config | alone | {"dtype": dtype})


def _programs(directory: Path, config) -> list[Program]:
  try:
    return phases(config, make_mesh(jax.devices()[:1]))
  except (AttributeError, KeyError) as error:
    raise _foreign(directory, error) from error


def _foreign(directory: Path, error: Exception) -> UserError:
  return UserError(
    f"{directory / 'config.json'} must be that of a run of this code; a key is missing ({error}); read it with the "
    f"code that made it"
  )
