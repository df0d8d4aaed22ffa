"""Coordination of the processes of one run: joint success or failure, actions of process 0, comparison of settings.

All processes run the same program and must call these functions in the same order. The functions communicate through
the key-value store of `jax.distributed` and not through the devices, so that a process may wait for hours while another
one tokenizes a corpus, and an error on one process is raised on the waiting ones. A single process does not
communicate.

This is the only module that imports `jax._src`.
"""

import itertools
import json
import socket
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the store has no public name; orbax and multihost_utils import it from here, too

from switchlora_jax.errors import UserError

MAX_WAIT = 7 * 24 * 3600.0  # seconds; supervision ends the run much earlier if a process dies
_calls = itertools.count()  # numbers the calls of `exchange`, the same on all processes


class Store:
  """Key-value store that all processes of a run share; hosted by process 0, usable before any device is.

  Attributes:
    process, count: the number of this process, and the number of processes.
  """

  def __init__(self):
    state = distributed.global_state
    self.process, self.count, self._client = state.process_id, state.num_processes, state.client

  def set(self, key: str, value: str, overwrite: bool = False) -> None:
    """Store a value."""
    self._client.key_value_set(f"switchlora_jax/{key}", value, allow_overwrite=overwrite)

  def get(self, key: str, seconds: float = MAX_WAIT) -> str:
    """Return a value, once a process has set it; raises `JaxRuntimeError` after `seconds`."""
    return self._client.blocking_key_value_get(f"switchlora_jax/{key}", max(1, int(1000 * seconds)))

  def items(self, folder: str) -> dict[str, str]:
    """Return the present values of the keys `folder/NAME`, by NAME."""
    found = self._client.key_value_dir_get(f"switchlora_jax/{folder}")
    return {key.rpartition("/")[2]: value for key, value in found}


def is_first() -> bool:
  """Return whether this is process 0, which prints, logs and writes all files except the arrays of checkpoints."""
  return jax.process_index() == 0


def print_once(text: str) -> None:
  """Print on process 0."""
  if is_first():
    print(text, flush=True)


def exchange(text: str) -> list[str]:
  """Return the texts that the processes pass to this call, in the order of their numbers."""
  store = Store()
  if store.count == 1:
    return [text]
  call = next(_calls)
  store.set(f"{call}/{store.process}", text)
  return [store.get(f"{call}/{process}") for process in range(store.count)]


def on_all_processes(action: Callable[[], Any]):
  """Return `action()`, after it has succeeded on every process.

  Raises:
    UserError: on all processes if it failed on any, with the message of the first one that failed. An exception of
      another type is raised unchanged on its own process.
  """
  result, failure = None, None
  try:
    result = action()
  except Exception as error:  # of any type, since the other processes must not wait for this one
    failure = error
  unexpected = failure is not None and not isinstance(failure, UserError)
  failures = exchange(f"{type(failure).__name__}: {failure}" if unexpected else str(failure or ""))
  if unexpected or (failure and len(set(failures)) == 1):  # the same mistake on all: no process is named
    raise failure
  for process, message in enumerate(failures):
    if message:
      raise UserError(f"process {process}: {message}")
  return result


def on_first_process(action: Callable[[], Any]):
  """Return `action()` on process 0; the others wait for it and return None. Raises as `on_all_processes` does."""
  return on_all_processes(action if is_first() else lambda: None)


def first_then_others(action: Callable[[], Any]):
  """Return `action()`, which process 0 runs before the others do. Raises as `on_all_processes` does."""
  result = on_first_process(action)
  return on_all_processes((lambda: result) if is_first() else action)


def check_same(facts: dict[str, Any]) -> None:
  """Check that `facts`, a dict of plain values, is equal on all processes.

  Raises:
    UserError: on all processes, naming the keys that differ from those of process 0, with both values.
  """
  shown = {key: repr(value) for key, value in facts.items()}
  first, *others = (json.loads(text) for text in exchange(json.dumps(shown)))
  for process, found in enumerate(others, 1):
    keys = sorted(key for key in first.keys() | found.keys() if first.get(key) != found.get(key))
    if keys:
      differences = (
        f"{key} is {found.get(key, 'unset')} there and {first.get(key, 'unset')} on process 0" for key in keys
      )
      raise UserError(
        f"process {process} was not started like process 0: {'; '.join(differences)}; "
        f"start all processes with the same code, command and files"
      )


def check_devices() -> None:
  """Check that all processes have the same number of devices, of one kind.

  Raises:
    UserError: on all processes, naming the process without devices, or the devices of each.
  """
  on_all_processes(_find_devices)
  devices, count = jax.devices(), jax.process_count()
  kinds = [[device.device_kind for device in devices if device.process_index == p] for p in range(count)]
  if any(own != kinds[0] for own in kinds):
    found = ", ".join(f"{len(own)} × {'/'.join(sorted(set(own)))} on process {p}" for p, own in enumerate(kinds))
    raise UserError(f"all processes must have the same devices; found {found}; give each the same number, of one kind")


def _find_devices():
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # AssertionError: JAX_PLATFORMS names a plugin that is not installed
    reason = (str(error).strip().splitlines() or ["no such platform"])[0]
    raise UserError(
      f"JAX found no devices for all processes: {reason}; check JAX_PLATFORMS and the GPUs of each process"
    ) from error


def describe_process() -> str:
  """Return a line such as `process 1 of 2 on node7: 4 × NVIDIA H100`."""
  devices = f"{jax.local_device_count()} × {jax.local_devices()[0].device_kind}"
  return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: {devices}"
