"""Checkpoints through orbax: asynchronous, the newest few kept, and read back only if they are what was written.

A save is written under a temporary name; when all processes have written their share of the arrays, process 0 adds
the manifest, then orbax gives the directory its name. So there is no moment at which a step is listed and not whole,
and the older ones are removed only after that.

Orbax does not notice flipped bits. The manifest has two kinds of checksums, and both are needed. Those of the files
are compared before anything is read: they find what the disk did, and the command that lists checkpoints needs no
device for them. Those of the arrays, computed on the devices before a save and after a restore, are the only ones
that span the whole way: a cast dtype, a missing row, a mistake of a layout.

Every process of a run calls each of these functions; all share one directory.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from switchlora_jax.errors import UserError
from switchlora_jax.parallel import processes
from switchlora_jax.runs import manifest
from switchlora_jax.runs.checksums import named_checksums

log = logging.getLogger(__name__)

TEMPORARY = ".orbax-checkpoint-tmp"  # what orbax adds to the name of a step while it is written
REMOVED = ".removed"  # what is added while it is removed

OTHER_VERSION = "its arrays are not those of this code's state; code of another version has saved it"

LEFT_OUT = ocp.PLACEHOLDER  # in place of an array that is not to be read


class Checkpoints:
  """The checkpoints of one run, in `directory`; a context that waits for the last save when it ends.

  Without `keep`, the number of newest ones that are kept (and one more until the next save begins, or all ends),
  they are another's, only to be read.
  """

  def __init__(self, directory: Path, keep: int | None = None):
    self._directory, self._keep = directory.absolute(), keep
    self._saving, self._arrays = None, {}  # the step that is being saved, or was last, and its checksums
    if keep:
      logging.getLogger("absl").addFilter(_is_news)
      sys.unraisablehook = _say_news
      # Where a directory cannot be made, threads that are to write into it would wait for it for minutes.
      options = ocp.options.AsyncOptions(
        post_finalization_callback=self.finish, create_directories_asynchronously=False
      )
      handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=options))
      self._writer = ocp.AsyncCheckpointer(handler, async_options=options)

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if not self._keep:
      return
    try:
      self.wait()
    except UserError as error:
      if kind is None:
        raise
      log.warning("%s", error)  # what is raised already is what ended the run
    finally:
      self._writer.close()

  def steps(self) -> list[int]:
    """The steps that have a finished checkpoint, oldest first."""
    return manifest.finished(self._directory)

  def save(self, step: int, state):
    """Start writing the state before step `step`; returns once the arrays may be overwritten.

    Raises:
      UserError: it could not be started, or the save before it has failed.
    """
    self.wait()
    self._saving, self._arrays = step, named_checksums(state)
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(state))
    with self._failure_as_sentence():
      self._writer.save(self._directory / str(step), args=items)

  def check(self):
    """Raise the `UserError` of the last save if it has failed by now; a look at a variable, on this process alone.

    The other processes learn of it by the loss of this one: to agree would cost them a message in every step.
    """
    with self._failure_as_sentence():
      self._writer.check_for_errors()

  def wait(self):
    """Wait for the save in flight; then more than `keep` are not needed any more. Raises as `save`."""
    with self._failure_as_sentence():
      self._writer.wait_until_finished()
    if processes.is_first() and (old := self.steps()[: -self._keep]):
      try:
        self._remove(old)
      except OSError as error:  # on network drives, while another reads it
        log.warning("an old checkpoint in %s could not be removed (%s); the run goes on", self._directory, error)

  def _remove(self, steps: list[int]):
    manifest.sync(self._directory)  # the names of the newer ones are on the disk before the older ones go
    for step in steps:
      shutil.rmtree((self._directory / str(step)).rename(self._directory / f"{step}{REMOVED}"))

  def finish(self):
    """Called by orbax on process 0 when all have written their share, before the directory gets its name."""
    manifest.write(self._directory / f"{self._saving}{TEMPORARY}", self._saving, self._arrays)

  @contextlib.contextmanager
  def _failure_as_sentence(self):
    try:
      yield
    except (OSError, ValueError) as error:  # the latter from tensorstore
      steps = self.steps()
      raise UserError(
        f"the checkpoint of step {self._saving} could not be saved in {self._directory}: {_system_says(error)}; "
        f"{f'that of step {steps[-1]} is whole' if steps else 'there is none before it'}; make room there, or give "
        f"yourself access, and the same command continues from {f'step {steps[-1]}' if steps else 'the start'}"
      ) from error

  def restore(self, abstract_at, step: int | None = None):
    """The newest good state, or None where nothing was saved yet; or that of a step.

    Where a newer one is unfinished or damaged, it is moved aside, next to `checkpoints/`, with a warning that names it.

    Args:
      abstract_at: from a step to a pytree of ShapeDtypeStruct with shardings, as its state shall come back; what is
        LEFT_OUT there is not read, and None comes back.
      step: one of `steps()`; the newest by default.
    Raises:
      UserError: there are checkpoints and none can be read back; they stay where they are.
    """
    if self._keep:
      self.wait()
      processes.on_first_process(self._sweep)
    found = list(manifest.directories(self._directory))
    processes.check_same({f"the list of checkpoints in {self._directory}": found})
    damaged = {}
    for candidate in reversed(found if step is None else [step]):
      try:
        state = self._restore(candidate, abstract_at(candidate))
      except (jax.errors.JaxRuntimeError, MemoryError):  # no room for it here says nothing of the file
        raise
      except Exception as error:  # whatever a damaged file makes orbax, tensorstore or json raise
        damaged[candidate] = _reason(error)
        continue
      processes.on_first_process(lambda: [self._pass_over(step, reason) for step, reason in damaged.items()])
      return state
    if damaged:
      raise self._none_is_good(damaged)
    return None

  def _none_is_good(self, damaged: dict[int, str]) -> UserError:
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    remedy = "start over in a new --workdir" if self._keep else "choose another"
    remedy += ", or use the code that saved them" * (OTHER_VERSION in damaged.values())
    return UserError(f"none of the checkpoints in {self._directory} can be read back ({reasons}); {remedy}")

  def _sweep(self):
    """Remove what a process that was killed had half written or half removed."""
    for left in self._directory.glob(f"*{TEMPORARY}"):
      shutil.rmtree(left)
    for left in self._directory.glob(f"*{REMOVED}"):
      shutil.rmtree(left, ignore_errors=True)  # where another reads it, the next restore removes it

  def _restore(self, step: int, abstract):
    folder, share = self._directory / str(step), (jax.process_index(), jax.process_count())
    # A file that only one process could not read must be passed over by all.
    saved = processes.on_all_processes(lambda: manifest.verify(folder, share))
    # Not strict: padding differs between layouts. What else is cut off or added, checksums and shapes tell.
    wanted = ocp.args.PyTreeRestore(abstract, ocp.checkpoint_utils.construct_restore_args(abstract, strict=False))
    with ocp.PyTreeCheckpointer() as reader:
      restored = processes.on_all_processes(lambda: reader.restore(folder / manifest.COVERED, args=wanted))
    state = jax.tree.map(lambda leaf: None if leaf is LEFT_OUT else leaf, restored)
    leaves = jax.tree.leaves_with_path(abstract)
    left_out = {jax.tree_util.keystr(path) for path, leaf in leaves if leaf is LEFT_OUT}
    found = named_checksums(state)
    names = (saved.arrays.keys() - left_out) | found.keys()
    if wrong := [name for name in names if saved.arrays.get(name) != found.get(name)]:
      raise ValueError(f"checksum or shape of {min(wrong)} and {len(wrong) - 1} more arrays is not what was saved")
    return state

  def _pass_over(self, step: int, reason: str):
    """Say that a checkpoint is damaged, and move it aside if it is ours."""
    where = f"moved to {self._set_aside(step)}" if self._keep else "an older one is read"
    log.warning("checkpoint of step %d is damaged (%s); %s", step, reason, where)

  def _set_aside(self, step: int) -> Path:
    number = 0
    while (target := self._directory.with_name(f"damaged-{step}-{number}")).exists():
      number += 1
    return (self._directory / str(step)).rename(target)


def _system_says(error: Exception) -> str:
  """`No space left on device`; tensorstore hides it behind a line of paths."""
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(found[1])) if found else getattr(error, "strerror", None) or str(error)


def _is_news(record: logging.LogRecord) -> bool:
  """Whether it is anything but the traceback that each thread of orbax logs of a save that failed: a sentence tells."""
  return not (record.exc_info and "orbax" in record.pathname)


def _say_news(raised):
  """`sys.unraisablehook` but for what tensorstore raises for each array that was under way when a save failed."""
  if str(raised.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(raised)


def _reason(error: Exception) -> str:
  """One line, without the name of a class where it is a sentence of ours."""
  if "tree structures do not match" in str(error):  # which orbax follows by all of both
    return OTHER_VERSION
  name = "" if isinstance(error, (manifest.Damaged, UserError)) else f"{type(error).__name__}: "
  return f"{name}{error}".strip().splitlines()[0][:200]
