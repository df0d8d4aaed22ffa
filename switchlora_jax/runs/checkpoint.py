"""Checkpoints through orbax: saved asynchronously, the newest few kept, verified when they are restored.

A save is written under a temporary name. When all processes have written their shares of the arrays, process 0 adds the
manifest, then orbax renames the directory. A listed step is therefore always complete. Older checkpoints are removed
only after that.

Orbax does not detect flipped bits. The manifest has two kinds of checksums, and both are needed. Those of the files are
compared before anything is read: they detect errors of the disk, and `experiments.checkpoints` can compare them without
a device. Those of the arrays are computed on the devices before a save and after a restore: they also detect errors in
between, such as a cast dtype, a missing row or a wrong layout.

All processes of a run call each of these functions, and share one directory.
"""

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from switchlora_jax.errors import RunFailed, Stopped, UserError
from switchlora_jax.parallel import processes
from switchlora_jax.runs import manifest
from switchlora_jax.runs.array_checksums import array_checksums, saved_shape
from switchlora_jax.runs.files import sync_directory

log = logging.getLogger(__name__)

TEMPORARY = ".orbax-checkpoint-tmp"  # orbax's suffix of a step directory that is being written
REMOVED = ".removed"  # suffix of a step directory that is being removed

OTHER_VERSION = "its arrays are not those of this code's state; another version of the code saved it"


class Weights(NamedTuple):
  """The part of a train state that defines the model; restored without candidates and optimizer state.

  Attributes:
    step: [] int32. params, frozen: as in `methods.base.TrainState`.
  """

  step: Any
  params: Any
  frozen: Any


def weights_of(state) -> Weights:
  """The weights of a train state, abstract or not."""
  return Weights(state.step, state.params, state.frozen)


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for the last save when it exits.

  Args:
    directory: `checkpoints/` of the run.
    keep: number of newest checkpoints to keep; one more exists until the next save begins or the context exits. None
      opens the checkpoints of another run: they are only read.
  """

  def __init__(self, directory: Path, keep: int | None = None):
    self._directory, self._keep = directory.absolute(), keep
    self._step, self._arrays = None, {}  # of the save in flight, or of the last one: its step and array checksums
    if keep:
      # If the directory cannot be created, threads that write into it would otherwise wait for minutes.
      options = ocp.options.AsyncOptions(
        post_finalization_callback=self.finish, create_directories_asynchronously=False
      )
      handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=options))
      self._writer = ocp.AsyncCheckpointer(handler, async_options=options)

  def __enter__(self):
    if self._keep:
      logging.getLogger("absl").addFilter(_is_not_traceback_of_orbax)
    return self

  def __exit__(self, kind, *_):
    if not self._keep:
      return
    try:
      self.wait()
    except UserError as error:
      if kind is None:
        raise
      log.warning("%s", error)  # the exception in flight is what ended the run
    finally:
      self._writer.close()
      logging.getLogger("absl").removeFilter(_is_not_traceback_of_orbax)

  def steps(self) -> list[int]:
    """The steps of all complete checkpoints, in ascending order."""
    return manifest.finished(self._directory)

  def save(self, step: int, state):
    """Starts to write the state before step `step`; returns as soon as the arrays may be overwritten.

    Raises:
      UserError: the save could not be started, or the previous save failed.
    """
    self.wait()
    self._step, self._arrays = step, array_checksums(state)
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(state))
    with self._failure_as_user_error():
      self._writer.save(self._directory / str(step), args=items)

  def check(self):
    """Raises the `UserError` of the save in flight if it has failed by now; does not wait and does not communicate.

    The other processes notice the failure when this process ends. An agreement would need a message per step.
    """
    with self._failure_as_user_error():
      self._writer.check_for_errors()

  def wait(self):
    """Waits for the save in flight, then removes all but the newest `keep` checkpoints. Raises as `save`."""
    with self._failure_as_user_error():
      self._writer.wait_until_finished()
    if processes.is_first() and (old := self.steps()[: -self._keep]):
      try:
        self._remove(old)
      except OSError as error:  # on network drives, if another process reads the checkpoint
        log.warning("an old checkpoint in %s could not be removed (%s); the run continues", self._directory, error)

  def _remove(self, steps: list[int]):
    sync_directory(self._directory)  # the newer checkpoints must be on the disk before the older ones are removed
    for step in steps:
      shutil.rmtree((self._directory / str(step)).rename(self._directory / f"{step}{REMOVED}"))

  def finish(self):
    """Called by orbax on process 0 when all processes have written, before the directory is renamed."""
    manifest.write(self._directory / f"{self._step}{TEMPORARY}", self._step, self._arrays)

  @contextlib.contextmanager
  def _failure_as_user_error(self):
    try:
      yield
    except (OSError, ValueError) as error:  # the latter from tensorstore
      steps = self.steps()
      raise UserError(
        f"the checkpoint of step {self._step} could not be saved in {self._directory}: {_os_reason(error)}; "
        f"{f'that of step {steps[-1]} is complete' if steps else 'there is none before it'}; free space there, or "
        f"change its permissions, and the same command continues from {f'step {steps[-1]}' if steps else 'the start'}"
      ) from error

  def restore(self, abstract_at, step: int | None = None, *, partial: bool = False):
    """Returns the newest valid state, or that of one step; None if nothing was saved yet.

    Newer checkpoints that are incomplete or damaged are skipped with a warning. If they belong to this run, they
    are moved out of `checkpoints/`, into the directory of the run.

    Args:
      abstract_at: function from a step to a pytree of ShapeDtypeStruct, the structure of its state. A leaf with a
        sharding is restored as a JAX array, a leaf without one as a NumPy array on every process.
      step: one of `steps()`; the newest valid one by default.
      partial: whether to read only those entries of the state (fields of a NamedTuple, keys of a dict) that the
        abstract state has, such as the fields of `Weights`.
    Raises:
      UserError: there are checkpoints, and none can be restored; they stay where they are.
    """
    if self._keep:
      self.wait()
      processes.on_first_process(self._remove_leftovers)
    found = list(manifest.directories(self._directory))
    processes.check_same({f"the list of checkpoints in {self._directory}": found})
    damaged = {}
    for candidate in reversed(found if step is None else [step]):
      try:
        state = self._restore(candidate, abstract_at(candidate), partial)
      except (jax.errors.JaxRuntimeError, MemoryError):  # out of memory here: the files may be good
        raise
      except (Stopped, RunFailed):  # raised by a signal handler or by supervision, whatever the main thread does
        raise
      except Exception as error:  # whatever orbax, tensorstore or json raises on a damaged file
        damaged[candidate] = _reason(error)
        continue
      processes.on_first_process(lambda: [self._skip_damaged(step, reason) for step, reason in damaged.items()])
      return state
    if damaged:
      raise self._none_is_good(damaged)
    return None

  def _none_is_good(self, damaged: dict[int, str]) -> UserError:
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    remedy = "start over in a new --workdir" if self._keep else "choose another"
    remedy += ", or use the code that saved them" * (OTHER_VERSION in damaged.values())
    return UserError(f"none of the checkpoints in {self._directory} can be read back ({reasons}); {remedy}")

  def _remove_leftovers(self):
    """Removes what a killed process left half written or half removed."""
    for path in self._directory.glob(f"*{TEMPORARY}"):
      shutil.rmtree(path)
    for path in self._directory.glob(f"*{REMOVED}"):
      shutil.rmtree(path, ignore_errors=True)  # if another process reads it, the next restore removes it

  def _restore(self, step: int, abstract, partial: bool):
    folder, share = self._directory / str(step), (jax.process_index(), jax.process_count())
    # If one process cannot read a file, all must skip the checkpoint.
    saved = processes.on_all_processes(lambda: manifest.verify(folder, share))
    expected = _check_structure(saved.arrays, abstract, partial)
    # Not strict: padding differs between layouts. Checksums and shapes detect rows that are cut off or added.
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract, strict=False)
    args = ocp.args.PyTreeRestore(abstract, restore_args, partial_restore=partial)
    with ocp.PyTreeCheckpointer() as reader:
      state = processes.on_all_processes(lambda: reader.restore(folder / manifest.COVERED, args=args))
    found = array_checksums(state)
    if wrong := [name for name in expected if saved.arrays[name] != found[name]]:
      raise ValueError(f"checksum or shape of {min(wrong)} and {len(wrong) - 1} more arrays is not what was saved")
    return state

  def _skip_damaged(self, step: int, reason: str):
    """Warns of a damaged checkpoint, and moves it aside if it belongs to this run."""
    action = f"moved to {self._set_aside(step)}" if self._keep else "an older one is used"
    log.warning("checkpoint of step %d is damaged (%s); %s", step, reason, action)

  def _set_aside(self, step: int) -> Path:
    number = 0
    while (target := self._directory.with_name(f"damaged-{step}-{number}")).exists():
      number += 1
    return (self._directory / str(step)).rename(target)


def _check_structure(saved: dict[str, list[int]], abstract, partial: bool) -> set[str]:
  """The names of the arrays to restore; raises `Damaged` if the checkpoint does not have exactly these, or if the
  shape of one differs.
  """
  shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(abstract)}
  names = saved.keys()
  if partial:
    entries = jax.tree.leaves_with_path(abstract, is_leaf=lambda node: node is not abstract)  # empty ones as well
    wanted = {jax.tree_util.keystr(path) for path, _ in entries}
    names = {name for name in names if re.match(r"\.\w+|\['[^']*'\]|", name)[0] in wanted}
  if names != shapes.keys():
    raise manifest.Damaged(OTHER_VERSION)
  for name, shape in shapes.items():
    if (found := saved[name][1:]) != (expected := list(saved_shape(name, shape))):
      raise manifest.Damaged(f"{name} has the shape {found} there and {expected} in this code's state")
  return set(names)


def _os_reason(error: Exception) -> str:
  """`No space left on device`, which tensorstore hides behind a line of paths."""
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(found[1])) if found else getattr(error, "strerror", None) or str(error)


def _is_not_traceback_of_orbax(record: logging.LogRecord) -> bool:
  """False for the tracebacks that orbax's threads log when a save fails: the `UserError` has the reason."""
  return not (record.exc_info and "orbax" in record.pathname)


def _reason(error: Exception) -> str:
  """One line, without the name of the class for our own errors."""
  name = "" if isinstance(error, (manifest.Damaged, UserError)) else f"{type(error).__name__}: "
  return f"{name}{error}".strip().splitlines()[0][:200]
