"""Full-rank training first, then a low-rank method from its weights (section 4.3).

Two ways: `warm_start_steps` of full rank within a run, after which the data go on; or `warm_start_from`, a finished
run (the authors' way) or a Hugging Face LLaMA whose weights a new run starts from. All carry over the function:
embedding, norms and head as they are, adapters split off the kernels. Moments and counts start afresh.
"""

from functools import partial
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict
from ml_collections import FrozenConfigDict

from switchlora_jax.errors import UserError
from switchlora_jax.interop import huggingface
from switchlora_jax.methods.base import TrainState
from switchlora_jax.models import weights
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.training.phases import Phase, build_phases, phase_at


def hand_over(state: TrainState, before: Phase, after: Phase) -> TrainState:
  """The state with which `after` goes on from a state of `before`: same function, same step, new optimizer."""

  counters = {name: getattr(state, name) for name in ("step", "skipped", "skipped_in_a_row", "spikes")}
  return _convert(state.params, state.frozen, before.scale, after)._replace(**counters)


def _convert(params, frozen, scale: float | None, after: Phase) -> TrainState:
  """The state of `after` before step 0, with the function of other params, frozen kernels and scale of adapters."""

  def convert(params, frozen):
    fresh = after.create()
    plain = weights.merged(params, frozen, scale)
    params, frozen = weights.split(plain, fresh.params, fresh.frozen, after.scale)
    # Another run's weights may be of another dtype than this one stores.
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, fresh.params)
    return fresh._replace(params=params, frozen=frozen)

  lies = jax.tree.map(lambda x: x.sharding, after.abstract)
  return jax.jit(convert, out_shardings=lies)(params, frozen)


class Source:
  """The run or the Hugging Face LLaMA folder that `warm_start_from` names.

  Raises:
    UserError: when it is made, where there is no such thing or its model has other sizes; names the first array of
      another shape and the keys.
  """

  def __init__(self, config, phase: Phase, mesh):
    directory = Path(config.warm_start_from).expanduser()
    self._program = phase
    self._other = _Folder(directory, config) if huggingface.is_folder(directory) else _Run(directory, config, mesh)
    wrong = {name: there for name, there in self._other.sizes.items() if there != config.model[name]}
    if wrong:
      raise UserError(
        f"the model of --config.warm_start_from={config.warm_start_from} has other sizes than this one"
        f"{_first_difference(self._other.shapes(), _shapes(phase))}; "
        f"set {' '.join(f'--config.model.{name}={there}' for name, there in wrong.items())}"
      )

  def check_tokenizer(self, tokenizer_path: str):
    """Raise `UserError` unless the token ids mean there what they mean in the new run."""
    model = self._other.directory / huggingface.TOKENIZER
    if model.exists() and model.read_bytes() != Path(tokenizer_path).read_bytes():
      raise UserError(
        f"the model in {self._other.directory} was trained with another tokenizer than this run would be; "
        f"pass --config.data.tokenizer={model}"
      )

  def state(self) -> TrainState:
    """The state before step 0, with the weights of the folder, or of the run's newest checkpoint."""
    return _convert(*self._other.read(), self._program)


def _shapes(phase: Phase) -> dict:
  """The plain weights of a program, as ShapeDtypeStructs."""
  state = phase.abstract
  return jax.eval_shape(partial(weights.merged, scale=phase.scale), state.params, state.frozen)


def _first_difference(there: dict, here: dict) -> str:
  """`: blocks/down/kernel is [2, 24, 16] there and [2, 32, 16] here`; empty where the number of heads alone differs."""
  there, here = (flatten_dict(plain, sep="/") for plain in (there, here))
  for name in sorted(here):
    if there[name].shape != here[name].shape:
      return f": {name} is {list(there[name].shape)} there and {list(here[name].shape)} here"
  return ""


class _Folder:
  """A Hugging Face LLaMA: where it lies, and its sizes."""

  def __init__(self, directory: Path, config):
    self._folder = huggingface.inspect(directory)
    if self._folder.tokenizer is None and not config.data.tokenizer:
      raise UserError(
        f"--config.warm_start_from={config.warm_start_from} has no tokenizer.model, the SentencePiece file of its "
        f"token ids; put it there, or name one with the same ids by --config.data.tokenizer"
      )
    self.directory, self.sizes = directory, self._folder.sizes

  def shapes(self) -> dict:
    """Its plain weights, as ShapeDtypeStructs."""
    return huggingface.shapes(self.sizes)

  def read(self):
    """(params, frozen, scale of adapters)."""
    return huggingface.read(self._folder), {}, None


class _Run:
  """A run: likewise."""

  def __init__(self, directory: Path, config, mesh):
    self.directory = directory
    named = f"--config.warm_start_from={config.warm_start_from}, unless it is a Hugging Face LLaMA folder,"
    run_directory.check_is_run(named, directory, "checkpoints", "tokenizer.model")
    saved = run_directory.read(directory)
    if saved["config"]["param_dtype"] == "float64" and not jax.config.jax_enable_x64:
      raise UserError(
        f"the run in {directory} is stored in float64 and cannot be read by a float32 run; "
        f"set --config.param_dtype=float64"
      )
    here = config.to_dict()  # whatever the other run was laid out like, it is read as this one is
    layout = {key: here[key] for key in ("sharding", "remat", "accumulation", "batch_size")}
    self.sizes = saved["config"]["model"]
    self._phases = build_phases(FrozenConfigDict(here | saved["config"] | layout), mesh)

  def shapes(self) -> dict:
    """Its plain weights, as ShapeDtypeStructs."""
    return _shapes(self._phases[-1])

  def read(self):
    """(params, frozen, scale of adapters) of the newest checkpoint."""
    with Checkpoints(self.directory / "checkpoints") as checkpoints:
      state = checkpoints.restore(lambda step: phase_at(self._phases, step).abstract)
    if state is None:
      raise UserError(f"the run in {self.directory} has saved no checkpoint yet; let it train longer")
    return state.params, state.frozen, phase_at(self._phases, int(state.step)).scale
