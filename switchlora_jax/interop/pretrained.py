"""Opens a saved model, either a run or a Hugging Face folder, and reads its plain weights.

`inspect` reads only descriptions, and `read` reads the weights; `load` does both, for commands that also need the
tokenizer. Plain weights are the `params` of the full-rank model (`models.weights`). Every process that calls these
functions reads the files and holds the whole model in host memory.
"""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import FrozenConfigDict

from switchlora_jax.data.tokenizer import load_tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.interop import huggingface, tokenizer_json
from switchlora_jax.lowrank.kernel_storage import KERNEL, STORAGE, forward_kernel, load_kernel
from switchlora_jax.lowrank.kinds import kind_of, linear_layers
from switchlora_jax.methods import METHODS, config_at
from switchlora_jax.methods.base import dtypes
from switchlora_jax.models import LLaMA, make_model
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.checkpoint import Checkpoints, Weights
from switchlora_jax.runs.directory import SavedRun


class Pretrained(NamedTuple):
  """A pre-trained model, independent of the method that trained it.

  Attributes:
    architecture: the keys of `config.model`.
    weights: plain weights, adapters merged in; NumPy arrays in float32, or in float64 if they are stored in float64.
    tokenizer: of its token ids, see `data.tokenizer.load_tokenizer`; None if a Hugging Face folder has none.
    origin: a description for messages, for example `runs/tiny, switchlora, step 1000 of 2000`.
    seq_len: tokens per sequence in training.
    method: the method that trained it; None for a Hugging Face folder.
    prefix: token ids that preceded every text in training: as `transformers` prepends them, such as BOS; none for runs.
  """

  architecture: dict
  weights: dict
  tokenizer: Path | None
  origin: str
  seq_len: int
  method: str | None
  prefix: tuple[int, ...] = ()


class RunWeights(NamedTuple):
  """A checkpoint of a run, with adapters separate from their base kernels.

  Attributes:
    run: the run.
    step: the step of the checkpoint.
    model: the LLaMA of the phase that made it, which computes in float32, or in float64 if it stores float64.
    params, frozen: the collections of the model; NumPy arrays in the dtypes of the checkpoint.
    scale: s = α/r of the adapters; None if there are none.
  """

  run: SavedRun
  step: int
  model: LLaMA
  params: Any
  frozen: Any
  scale: float | None


def inspect(path: Path, tensors: bool = True) -> SavedRun | huggingface.Folder:
  """Opens a run or a Hugging Face folder without reading its weights; both have `architecture` and `tokenizer`.

  Args:
    path: the directory.
    tensors: see `huggingface.inspect_folder`.
  Raises:
    UserError: it is neither, the run has no checkpoint, or the folder holds another kind of model.
  """
  if huggingface.is_folder(path):
    return huggingface.inspect_folder(path, tensors)
  if run_directory.read(path) is None:
    raise UserError(
      f"{path} must be the directory of a run that has saved a checkpoint, or a Hugging Face folder "
      f"(config.json, model.safetensors); {'it is neither' if path.is_dir() else 'there is no such directory'}; "
      "`hf download NAME --local-dir FOLDER` downloads a model of the hub"
    )
  return run_directory.open_run(path)


def read(source: SavedRun | huggingface.Folder, *, residual: bool = False) -> Pretrained:
  """Reads the plain weights of what `inspect` opened; of a run, those of its newest valid checkpoint.

  Args:
    residual: see `merge`.
  Raises:
    UserError: no checkpoint of the run can be restored, or a key is missing in its config.
  """
  if isinstance(source, SavedRun):
    return merge(restore_weights(source), residual=residual)
  weights, prefix = huggingface.read_weights(source), tokenizer_json.prefix(source.path)
  length = source.architecture["max_position"]
  return Pretrained(source.architecture, weights, source.tokenizer, str(source.path), length, None, prefix)


def load(path: Path) -> Pretrained:
  """The model in the directory of a run, or in a Hugging Face folder that has a tokenizer.

  Raises:
    UserError: as `inspect` and `read`, or the folder has no tokenizer that fits its model.
  """
  source = inspect(path)
  if isinstance(source, huggingface.Folder):
    _check_tokenizer(source)
  return read(source)


def _check_tokenizer(folder: huggingface.Folder):
  """Raises `UserError` unless a folder has a tokenizer whose ids all have an embedding: others would give NaN."""
  if folder.tokenizer is None:
    raise UserError(
      f"{folder.path} must hold tokenizer.model or tokenizer.json, the tokenizer of its token ids; copy it there"
    )
  pieces, embeddings = load_tokenizer(folder.tokenizer).size, folder.architecture["vocab_size"]
  if pieces > embeddings:
    raise UserError(
      f"the tokenizer in {folder.path} must fit in the model's vocabulary (={embeddings}); it has {pieces} pieces; "
      "replace it by the tokenizer that the model was trained with"
    )


def restore_weights(run: SavedRun, step: int | None = None) -> RunWeights:
  """Restores the weights of a checkpoint into host memory; optimizer state and candidates are not read.

  Args:
    step: one of `run.steps`; the newest valid one by default.
  Raises:
    UserError: no checkpoint can be restored, or a key is missing in the run's config.
  """

  def model_at(step):
    with run.missing_key_as_error():
      return _model_and_scale(config_at(run.config, step))

  # Raises here, rather than in `restore`, which would report a damaged checkpoint. The phase of another step may need
  # other keys.
  model_at(run.steps[-1] if step is None else step)
  with full_precision(run.config.param_dtype), Checkpoints(run.directory / "checkpoints") as checkpoints:
    found = checkpoints.restore(lambda step: _abstract_weights(model_at(step)[0]), step, partial=True)
  if found is None:
    raise UserError(f"the checkpoints of the run in {run.directory} were removed while it was read; read it again")
  model, scale = model_at(int(found.step))
  return RunWeights(run, int(found.step), model, found.params, found.frozen, scale)


def _model_and_scale(config) -> tuple[LLaMA, float | None]:
  """The model that a config trains, computing in float32 or float64, and the scale of its adapters."""
  dtype = "float64" if config.param_dtype == "float64" else "float32"
  config = FrozenConfigDict(config.to_dict() | {"dtype": dtype})
  method = METHODS[config.method].build(config)
  return make_model(config.model, method.dense, **dtypes(config)), method.scale


def _abstract_weights(model: LLaMA) -> Weights:
  """The weights as ShapeDtypeStructs, which are restored as NumPy arrays."""
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
  return Weights(jax.ShapeDtypeStruct((), jnp.int32), variables["params"], variables.get("frozen", {}))


def merge(found: RunWeights, *, residual: bool = False) -> Pretrained:
  """The plain weights of a checkpoint, merged in float32 or wider, one kernel at a time.

  Args:
    residual: whether to add the int8 residual of a kernel in 16 or 8 bits. The forward pass of training does not read
      it, so the function of the run does not include it; a run that continues from the weights needs it.
  """
  run, plain = found.run, {}
  params = flatten_dict(found.params)
  with full_precision(run.config.param_dtype):
    for path, arrays in linear_layers(found.params, found.frozen).items():
      for name in arrays:
        params.pop((*path, name), None)
      if KERNEL in arrays:
        kernel = (load_kernel if residual else forward_kernel)(arrays)
        arrays = {name: array for name, array in arrays.items() if name not in STORAGE} | {KERNEL: kernel}
      plain[*path, KERNEL] = np.asarray(_merge_layer(jax.tree.map(_wide, arrays), scale=found.scale))
    plain |= {path: _wide(value) for path, value in params.items()}
  origin = f"{run.directory}, {run.config.method}, step {found.step} of {run.config.steps}"
  kept = (run.tokenizer, origin, run.config.seq_len, run.config.method)
  return Pretrained(run.architecture, unflatten_dict(plain), *kept)


@partial(jax.jit, static_argnames="scale")
def _merge_layer(arrays, scale):
  return kind_of(arrays).merged(arrays, scale)


def _wide(array) -> np.ndarray:
  """A NumPy array in float32, or in float64 if it was in float64; integers keep their dtype."""
  is_float = jnp.issubdtype(array.dtype, jnp.floating)
  return np.asarray(array, jnp.promote_types(array.dtype, jnp.float32) if is_float else array.dtype)


@contextlib.contextmanager
def full_precision(param_dtype: str):
  """Enables float64 for float64 weights, and float32 precision of products, which GPUs would round to TF32."""
  wide = jax.enable_x64(True) if param_dtype == "float64" else contextlib.nullcontext()
  with wide, jax.default_matmul_precision("highest"):
    yield
