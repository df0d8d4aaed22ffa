"""Warm starts: full-rank training first, then another method from its weights (section 4.3).

There are two ways. `warm_start_steps` makes the first steps of a run full-rank; the data order continues afterwards.
`warm_start_from` starts a new run from the weights of a run (as the authors do), of a Hugging Face folder, or of a
model of the hub.
Embedding, norms and head stay the same. Methods with base kernels keep the function of the model: each kernel is split
into a base kernel and an adapter. Layers without base kernels, and base kernels in 16 or 8 bits, store an
approximation, and its error is logged if it is more than rounding.
Optimizer state, candidates and counts are reinitialised.
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from switchlora_jax.data.tokenizer import copy_in_run, gives_same_ids
from switchlora_jax.errors import UserError
from switchlora_jax.interop import huggingface, pretrained
from switchlora_jax.methods.base import TrainState
from switchlora_jax.models import Architecture, architecture_of, weights
from switchlora_jax.models.architecture import derived_keys
from switchlora_jax.parallel import processes
from switchlora_jax.parallel.sharding import placement
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.directory import SavedRun, flatten
from switchlora_jax.runs.hub import HUB, folder_of
from switchlora_jax.training.phases import Phase

log = logging.getLogger(__name__)
ROUNDING = 1e-5  # relative error of kernels in float32 that is not logged


def hand_over(state: TrainState, before: Phase, after: Phase) -> TrainState:
  """The state with which phase `after` continues from a state of phase `before`.

  It has the same function up to the approximation that is logged (see `models.weights.split`), and the same step, skip
  counts and spike-detector state; the optimizer state is reinitialised.
  """
  kept = {name: getattr(state, name) for name in ("step", "skipped", "skipped_in_a_row", "spikes")}
  return _initial_state(after, state.params, state.frozen, before.scale)._replace(**kept)


def _initial_state(phase: Phase, params, frozen, scale: float | None) -> TrainState:
  """The state of `phase` before step 0, but with the function of other `params`, `frozen` and adapter `scale`."""
  exact = weights.is_exact(phase.abstract.params, phase.abstract.frozen)

  def convert(params, frozen):
    fresh = phase.create()
    plain = weights.merged(params, frozen, scale)
    params, frozen = weights.split(plain, fresh.params, fresh.frozen, phase.scale)
    # The other weights may have other dtypes.
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, fresh.params)
    error = 0.0 if exact else weights.relative_error(plain, params, frozen, phase.scale)
    return fresh._replace(params=params, frozen=frozen), error

  shardings = jax.tree.map(lambda x: x.sharding, phase.abstract)
  state, error = jax.jit(convert, out_shardings=(shardings, phase.abstract.step.sharding))(params, frozen)
  if error > ROUNDING and processes.is_first():
    log.warning("the kernels of the warm start are approximated, with a relative error of %.3g", error)
  return state


def adopt_architecture(
  config: ConfigDict, given: Collection[str], workdir: Path | None, weights: bool = False
) -> str | None:
  """Set `config.model` to the architecture of the model that `config.warm_start_from` names.

  `data.tokenizer` is set to its tokenizer as well, if it has one and the text is not prepared. A run that continues has
  the values that it started with, and the copy of its tokenizer: its source may be gone.

  Args:
    config: not resolved; changed in place.
    given: dotted keys that keep their values.
    workdir: the directory of the run, if known.
    weights: whether to download the weights of a model of the hub as well, and to check their names and shapes.
  Returns:
    The keys that were set from the source, as a line to print; None if there are none.
  Raises:
    UserError: `warm_start_from` names no model that can be read.
  """
  if not config.warm_start_from:
    return None
  saved = None if workdir is None else run_directory.read(workdir)
  found = _keys_of_source(config, weights) if saved is None else _keys_of_run(saved["config"], workdir)
  flat = flatten(config)
  keys = {key: value for key, value in found.items() if key in flat.keys() - set(given) and value != flat[key]}
  for key, value in keys.items():
    try:
      config.update_from_flattened_dict({key: value})
    except TypeError as error:
      raise UserError(f"{key} (={value!r}) of {workdir or config.warm_start_from} has another type: {error}") from error
  line = " ".join(f"{key}={value}" for key, value in keys.items())
  return f"set from {config.warm_start_from}: {line}" if keys and saved is None else None


def _keys_of_source(config: ConfigDict, weights: bool) -> dict[str, Any]:
  source = _inspect(config.warm_start_from, weights)
  keys = {f"model.{key}": value for key, value in flatten(source.architecture).items()}
  if source.tokenizer and config.data.source != "prepared":
    keys["data.tokenizer"] = str(source.tokenizer)
  # By default, a run has positions for its own sequences.
  if isinstance(source, SavedRun) and keys["model.rope.scaling"] != "dynamic":
    del keys["model.max_position"]
  return keys


def _keys_of_run(saved: dict, workdir: Path) -> dict[str, Any]:
  keys = {key: value for key, value in flatten(saved).items() if key.startswith("model.")}
  return keys | {"data.tokenizer": copy_in_run(saved.get("data", {}).get("tokenizer", ""), workdir)}


def _inspect(name: str, weights: bool) -> SavedRun | huggingface.Folder:
  """What `warm_start_from` names; of a model of the hub, the weights are downloaded only if `weights` is set."""
  files = huggingface.FILES if weights else huggingface.DESCRIPTION
  path = folder_of(name, files, "--config.warm_start_from", "its folder")
  try:
    return pretrained.inspect(path, tensors=weights or not name.startswith(HUB))
  except UserError as error:
    raise UserError(f"--config.warm_start_from: {error}") from error


class Source:
  """The run or Hugging Face folder that `warm_start_from` names.

  Args:
    config: resolved config of the new run.
    phase: its first phase.
    mesh: of the new run.
  Raises:
    UserError: `warm_start_from` names neither, or its model has another architecture; the message names the first array
      of another shape and the keys to set.
  """

  def __init__(self, config, phase: Phase, mesh):
    self._config, self._phase, self._mesh = config, phase, mesh
    self._source = _inspect(config.warm_start_from, weights=True)
    if self._source.tokenizer is None and not config.data.tokenizer:
      raise UserError(
        f"--config.warm_start_from={config.warm_start_from} has no tokenizer.model or tokenizer.json, the tokenizer of "
        f"its token ids; copy it there, or set --config.data.tokenizer to one with the same ids"
      )
    there, here = (architecture_of(keys) for keys in (self._source.architecture, config.model))
    # Other positions extend the context, and a head tied to the embedding may become one of its own.
    free = dict(rope=here.rope, max_position=here.max_position)
    self._unties = there.tied_embeddings and not here.tied_embeddings
    if there._replace(**free, **({"tied_embeddings": False} if self._unties else {})) != here:
      raise UserError(
        f"the model of --config.warm_start_from={config.warm_start_from} has another architecture than this one"
        f"{_first_difference(there, here)}; set {' '.join(_flags(there._replace(**free), here))}"
      )
    if there.rope != here.rope and processes.is_first():
      log.warning(
        "the rotary positions are not those of --config.warm_start_from: %s there, %s here", there.rope, here.rope
      )

  def check_tokenizer(self, tokenizer_path: str):
    """Raises `UserError` unless the source was trained with the tokenizer of the new run."""
    tokenizer = self._source.tokenizer
    if tokenizer and not gives_same_ids(tokenizer, Path(tokenizer_path)):
      raise UserError(
        f"the model in {tokenizer.parent} was trained with another tokenizer than this run would be; "
        f"pass --config.data.tokenizer={tokenizer}, or prepare the text with --tokenizer={tokenizer}"
      )

  def state(self) -> TrainState:
    """The state before step 0 with the weights of the source; of a run, those of its newest valid checkpoint.

    Every process reads the whole model into host memory, and places on each of its devices no more than the share that
    the mesh's `fsdp` axis gives it.
    """
    # A kernel in bfloat16 is read with its residual: the new run continues from its exact value.
    plain = pretrained.read(self._source, residual=True).weights
    if self._unties:
      plain["head"] = {"kernel": np.ascontiguousarray(plain["embed"]["embedding"].T)}
    specs = placement(self._config, self._mesh)._replace(trained=True).specs(plain, "trained")
    arrays, structure = jax.tree.flatten(plain)
    del plain  # with `arrays`, so that each copy on the host is freed once it is placed
    for number, spec in enumerate(jax.tree.leaves(specs, is_leaf=lambda at: isinstance(at, PartitionSpec))):
      arrays[number] = _place(self._mesh, arrays[number], spec)
    return _initial_state(self._phase, jax.tree.unflatten(structure, arrays), {}, None)


def _place(mesh, array, spec) -> jax.Array:
  """A NumPy array, the same on every process, as a sharded JAX array."""
  array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)  # float64 in a float32 run
  return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def _flags(there: Architecture, here: Architecture) -> list[str]:
  """The flags that give `here` the architecture of `there`, without those of keys that both leave to their defaults."""
  wanted, found = there._asdict(), here._asdict()
  theirs, ours = (derived_keys(model.hidden_size, model.num_heads) for model in (there, here))
  for key in theirs:
    if (wanted[key], found[key]) == (theirs[key], ours[key]):
      del wanted[key]
  return [f"--config.model.{key}={value}" for key, value in wanted.items() if value != found[key]]


def _first_difference(there: Architecture, here: Architecture) -> str:
  """`: blocks/down/kernel is [2, 24, 16] there and [2, 32, 16] here`; empty if all shapes are the same."""
  theirs, ours = there.plain_shapes(), here.plain_shapes()
  for name in sorted(ours):
    if theirs.get(name, ours[name]) != ours[name]:
      return f": {name} is {list(theirs[name])} there and {list(ours[name])} here"
  return ""
