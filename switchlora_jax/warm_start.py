"""Full-rank training first, then a low-rank method from its weights (section 4.3).

Two ways: `warm_start_steps` of full rank within a run, after which the data go on; or `warm_start_from`, a
finished run whose weights a new run starts from (the authors' way). Either carries over the function:
embedding, norms and head as they are, adapters split off the kernels. Moments and counts start afresh.
"""

from pathlib import Path

import jax
from ml_collections import FrozenConfigDict

from switchlora_jax import run_directory, weights
from switchlora_jax.checkpoint import Checkpoints
from switchlora_jax.errors import UserError
from switchlora_jax.program import Program, phases, trained_by
from switchlora_jax.train_state import TrainState


def hand_over(state: TrainState, before: Program, after: Program) -> TrainState:
  """The state with which `after` goes on from a state of `before`: same function, same step, new optimizer."""

  counters = {name: getattr(state, name) for name in ("step", "skipped", "skipped_in_a_row")}
  return _convert(state, before, after)._replace(**counters)


def _convert(state: TrainState, before: Program, after: Program) -> TrainState:
  """The state of `after` before step 0, with the function of a state of `before`."""

  def convert(params, frozen):
    fresh = after.create()
    plain = weights.merged(params, frozen, before.scale)
    params, frozen = weights.split(plain, fresh.params, fresh.frozen, after.scale)
    # Another run's weights may be of another dtype than this one stores.
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, fresh.params)
    return fresh._replace(params=params, frozen=frozen)

  lies = jax.tree.map(lambda x: x.sharding, after.abstract)
  return jax.jit(convert, out_shardings=lies)(state.params, state.frozen)


class Source:
  """The run that `warm_start_from` names.

  Raises:
    UserError: when it is made, where there is no such run or its model has other arrays; names them.
  """

  def __init__(self, config, program: Program, mesh):
    directory = config.warm_start_from
    self._directory, self._program = Path(directory).expanduser(), program
    saved = run_directory.read(self._directory)
    parts = [self._directory / name for name in ("checkpoints", "tokenizer.model")]
    if saved is None or not all(part.exists() for part in parts):
      raise UserError(
        f"--config.warm_start_from={directory} is not the directory of a run (it must hold config.json, checkpoints/ "
        f"and tokenizer.model); give the --workdir of a run that has saved a checkpoint"
      )
    if saved["config"]["param_dtype"] == "float64" and not jax.config.jax_enable_x64:
      raise UserError(
        f"the run in {self._directory} is stored in float64 and cannot be read by a float32 run; "
        f"set --config.param_dtype=float64"
      )
    here = config.to_dict()  # whatever the other run was laid out like, it is read as this one is
    layout = {key: here[key] for key in ("sharding", "remat", "accumulation", "batch_size")}
    self._programs = phases(FrozenConfigDict(here | saved["config"] | layout), mesh)
    plain = [jax.eval_shape(_merged, p.abstract, p.scale) for p in (self._programs[-1], program)]
    if wrong := weights.mismatches(*plain):
      raise UserError(
        f"the model of --config.warm_start_from={directory} has other arrays than this one: {'; '.join(wrong)}; "
        f"set --config.model as in its config.json"
      )

  def check_tokenizer(self, tokenizer_path: str):
    """Raise `UserError` unless the run's token ids mean what they mean in the new run."""
    model = self._directory / "tokenizer.model"
    if model.read_bytes() != Path(tokenizer_path).read_bytes():
      raise UserError(
        f"the run in {self._directory} was trained with another tokenizer than this run would be; "
        f"pass --config.data.tokenizer={model}"
      )

  def state(self) -> TrainState:
    """The state before step 0, with the weights of the run's newest checkpoint."""
    with Checkpoints(self._directory / "checkpoints") as checkpoints:
      state = checkpoints.restore(lambda step: trained_by(self._programs, step).abstract)
    if state is None:
      raise UserError(f"the run in {self._directory} has saved no checkpoint yet; let it train longer")
    before = trained_by(self._programs, int(state.step))
    return _convert(state, before, self._program)


def _merged(state, scale):
  return weights.merged(state.params, state.frozen, scale)
