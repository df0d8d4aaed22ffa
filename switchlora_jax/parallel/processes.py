"""Several processes, one run: what they must agree on, what the first one does alone, and how a failure ends them all.

Every process runs the same program, so every process must call these functions, in the same order. They talk
through the key-value store of `jax.distributed`, not through the devices: a wait may last as long as it takes
to tokenise a corpus, and a process that failed says so where the others wait. With one process they do nothing more
than call what they are handed.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the store has no public name yet; orbax and multihost_utils reach it the same way

from switchlora_jax.errors import UserError

LONGEST_WAIT = 7 * 24 * 3600 * 1000  # milliseconds; a process that died ends the others much sooner
FAREWELL = 10.0  # seconds
_turns = itertools.count()  # the same call is the same turn on every process


def is_first() -> bool:
  """Whether this is process 0, which prints, logs and writes what is not an array."""
  return jax.process_index() == 0


def print_once(text: str) -> None:
  """Print, once for all processes."""
  if is_first():
    print(text, flush=True)


def exchange(text: str) -> list[str]:
  """What every process hands in here, in the order of their numbers."""
  here = distributed.global_state  # knows the processes even where devices cannot be found
  if here.num_processes == 1:
    return [text]
  turn, get = next(_turns), here.client.blocking_key_value_get
  here.client.key_value_set(f"switchlora_jax/{turn}/{here.process_id}", text)
  return [get(f"switchlora_jax/{turn}/{process}", LONGEST_WAIT) for process in range(here.num_processes)]


def on_all_processes(action: Callable[[], Any]):
  """What `action()` returns here, once it has succeeded on every process.

  Raises:
    UserError: on all processes, where it failed on any; the sentence of the first that failed.
  """
  result, failure = None, None
  try:
    result = action()
  except Exception as error:  # whatever it is, the others must not wait for this process
    failure = error
  unexpected = failure is not None and not isinstance(failure, UserError)
  failures = exchange(f"{type(failure).__name__}: {failure}" if unexpected else str(failure or ""))
  if unexpected or (failure and len(set(failures)) == 1):  # a mistake that all make needs no name of a process
    raise failure
  for process, sentence in enumerate(failures):
    if sentence:
      raise UserError(f"process {process}: {sentence}")
  return result


def exit_process(error: BaseException) -> None:
  """End this process, which failed by `error`, as Python would; returns where it is the only one.

  JAX's own end of a process waits for all others for a minute, and aborts where one does not come. Process 0, through
  which all hear, is the last, but waits no longer than FAREWELL.
  """
  here = distributed.global_state
  if here.num_processes == 1:
    return
  code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
  last = threading.Timer(FAREWELL + 1, os._exit, [code])  # where process 0 is stopped, it takes no farewell
  last.daemon = True
  last.start()
  with contextlib.suppress(OSError, ValueError):  # the disk of a log is full
    if not isinstance(error, SystemExit):
      traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0, or one of the others, is not there any more
    if here.process_id:
      here.client.key_value_set(f"switchlora_jax/left/{here.process_id}", "")
    deadline = time.monotonic() + FAREWELL
    for process in range(1, 1 if here.process_id else here.num_processes):
      left = max(1, int(1000 * (deadline - time.monotonic())))
      here.client.blocking_key_value_get(f"switchlora_jax/left/{process}", left)
  os._exit(code)


def on_first_process(action: Callable[[], Any]):
  """What `action()` returns on process 0; the others wait for it and get None. Fails as `on_all_processes`."""
  return on_all_processes(action if is_first() else lambda: None)


def first_then_others(action: Callable[[], Any]):
  """What `action()` returns here; process 0 runs it first, then the others. Fails as `on_all_processes`."""
  done = on_first_process(action)
  return on_all_processes((lambda: done) if is_first() else action)


def check_same(facts: dict[str, Any]) -> None:
  """Make sure that all processes are about to do the same.

  Raises:
    UserError: on all processes, where `facts`, of plain values, differ from those of process 0; names them.
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
  """Make sure that every process has devices, as many as every other, all of a kind.

  Raises:
    UserError: on all processes; says which has none, or how many each has.
  """
  on_all_processes(_find_devices)
  devices, count = jax.devices(), jax.process_count()
  held = [[device.device_kind for device in devices if device.process_index == p] for p in range(count)]
  if any(kinds != held[0] for kinds in held):
    found = ", ".join(f"{len(kinds)} × {'/'.join(sorted(set(kinds)))} on process {p}" for p, kinds in enumerate(held))
    raise UserError(f"all processes must have the same devices; found {found}; give each as many, of one kind")


def _find_devices():
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter where JAX_PLATFORMS names a plugin that is not installed
    reason = (str(error).strip().splitlines() or ["no such platform"])[0]
    raise UserError(
      f"JAX found no devices for all processes: {reason}; see JAX_PLATFORMS and the GPUs of each"
    ) from error


def describe_process() -> str:
  """`process 1 of 2 on node7: 4 × NVIDIA H100`"""
  devices = f"{jax.local_device_count()} × {jax.local_devices()[0].device_kind}"
  return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: {devices}"
