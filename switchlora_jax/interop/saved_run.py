"""A run that is only read: its config, its tokenizer, and the weights of one of its checkpoints."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import FrozenConfigDict

from switchlora_jax.errors import UserError
from switchlora_jax.methods.base import TrainState
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs import manifest
from switchlora_jax.runs.checkpoint import LEFT_OUT, Checkpoints
from switchlora_jax.training.phases import Phase, build_phases, phase_at


class SavedRun(NamedTuple):
  """What a run directory says.

  Attributes:
    directory: the --workdir of the run.
    config: its resolved config.
    fingerprint: of the data that it is trained on.
    devices: how many it was started on.
    revision: the commit of the code that made it, or None.
    steps: those that have a checkpoint, oldest first; there is one.
  """

  directory: Path
  config: FrozenConfigDict
  fingerprint: str
  devices: int
  revision: str | None
  steps: list[int]

  @property
  def tokenizer(self) -> Path:
    """The SentencePiece model of its tokens."""
    return self.directory / "tokenizer.model"

  def alone(self) -> "SavedRun":
    """The same, to be read on one device."""
    with keys_of(self):
      layout = self.config.sharding.to_dict() | {"fsdp": 1, "frozen": "replicated"}
    return self._replace(config=FrozenConfigDict(self.config.to_dict() | {"sharding": layout}))

  def check_step(self, step: int, flag: str) -> None:
    """Raise `UserError` unless there is a checkpoint of the step, which a user named with `flag`."""
    if step not in self.steps:
      raise UserError(
        f"{flag} (={step}) must be a step of which the run in {self.directory} has a checkpoint: "
        f"{', '.join(map(str, self.steps))}; name one of them, or none for the newest"
      )


def open_run(directory: Path) -> SavedRun:
  """The run in a directory.

  Raises:
    UserError: it is not that of a run, is of other code, or nothing was saved yet.
  """
  run_directory.check_is_run(f"{directory}", directory, "tokenizer.model")
  saved = run_directory.read(directory)
  if not (steps := manifest.finished(directory / "checkpoints")):
    raise UserError(f"the run in {directory} has saved no checkpoint yet; let it train longer")
  devices = int(saved["devices"].split()[0])
  config = FrozenConfigDict(saved["config"])
  return SavedRun(directory, config, saved["data_fingerprint"], devices, saved["git_revision"], steps)


def restore(run: SavedRun, step: int | None, mesh, whole: bool = False) -> tuple[Phase, TrainState]:
  """The program of the phase in which a checkpoint was saved, and its state on `mesh`.

  Only the weights are read, unless the `whole` is wanted: `candidates` and `opt_state` hold None for each array.

  Args:
    step: one of `run.steps`; the newest that is not damaged by default.
  Raises:
    UserError: it cannot be read back.
  """
  with keys_of(run):
    phases = build_phases(run.config, mesh)
  read = (lambda abstract: abstract) if whole else _weights
  with Checkpoints(run.directory / "checkpoints") as checkpoints:
    state = checkpoints.restore(lambda step: read(phase_at(phases, step).abstract), step)
  return phase_at(phases, int(state.step)), state


@contextlib.contextmanager
def keys_of(run: SavedRun):
  """Raise `UserError` where a key is missing in the config of a run."""
  try:
    yield
  except (AttributeError, KeyError) as error:
    raise UserError(
      f"the run in {run.directory} was made by other code: a key of its config is missing ({error}); read it with the "
      f"code of then (git revision {run.revision})"
    ) from error


def _weights(abstract: TrainState) -> TrainState:
  """An abstract state of which the weights are read and the rest is not."""
  without = lambda tree: jax.tree.map(lambda _: LEFT_OUT, tree)
  return abstract._replace(candidates=without(abstract.candidates), opt_state=without(abstract.opt_state))
