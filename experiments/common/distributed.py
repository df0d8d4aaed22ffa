"""Connecting the processes of one run, from three flags or SLURM's variables, and ending them."""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping
from typing import NamedTuple

import jax
from absl import flags

from experiments.common import compiled_programs
from experiments.common.rendezvous import wait_for_all
from switchlora_jax.errors import HUNG, STOPPED, UserError, to_stderr
from switchlora_jax.parallel import processes
from switchlora_jax.parallel.supervision import GRACE

FIRST_PORT, PORTS = 61440, 4096  # above the ports that Linux assigns automatically
FAREWELL = GRACE + 3.0  # seconds that process 0 waits after a failure, so that the other processes end first


class Placement(NamedTuple):
  """HOST:PORT at which process 0 listens, the number of processes, and the number of this one."""

  coordinator: str
  count: int
  process: int


def define_flags():
  """Define the flags of a command that several processes can run together."""
  flags.DEFINE_string("coordinator", None, "HOST:PORT at which process 0 listens; the same on all processes")
  flags.DEFINE_integer("num_processes", None, "number of processes that run this command together; the same on all")
  flags.DEFINE_integer("process_id", None, "number of this process, from 0")
  flags.DEFINE_integer(
    "coordinator_timeout", 300, "seconds that processes wait for each other to start", lower_bound=1, upper_bound=10**6
  )
  flags.DEFINE_integer(
    "peer_timeout", 60, "seconds without a heartbeat after which another process counts as lost", lower_bound=5
  )


def initialize() -> None:
  """Connect this process to the others, if flags or SLURM define any; must precede any use of a device.

  Raises:
    UserError: the flags are inconsistent, a process is missing, or the devices of the processes differ.
  """
  values = flags.FLAGS
  placement = from_flags(values.coordinator, values.num_processes, values.process_id) or from_slurm(os.environ)
  if placement is None or placement.count == 1:
    return
  wait_for_all(*placement, values.coordinator_timeout)
  compiled_programs.only_if_asked()
  jax.config.update("jax_enable_preemption_service", False)  # see switchlora_jax/parallel/supervision.py
  # JAX aborts a process without naming the lost one, so its timeout is longer than that of the supervision.
  timeouts = dict(heartbeat_timeout_seconds=values.peer_timeout + 30, shutdown_timeout_seconds=60)
  # []: all devices that this process sees; JAX's default under SLURM is one GPU per task.
  jax.distributed.initialize(*placement, local_device_ids=[], **timeouts)
  processes.check_devices()
  print(processes.describe_process(), flush=True)


def end_process(message: str, code: int) -> None:
  """End this process at once, as `on_failure` of a `Supervisor`: the main thread may be blocked in a collective."""
  to_stderr(f"error: {message}" if code == HUNG else message)
  if code in (HUNG, STOPPED):  # the others end as well
    _wait_for_others()
  os._exit(code)


def exit_process(error: BaseException) -> None:
  """End this process as Python would after `error`, if it is one of several; returns if it is the only one.

  JAX's own exit waits a minute for all processes, and aborts if one is missing.
  """
  if processes.Store().count == 1:
    return
  with contextlib.suppress(OSError, ValueError):  # the disk of a log is full
    if not isinstance(error, SystemExit):
      traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
  _wait_for_others()
  os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _wait_for_others():
  """Wait on process 0, which hosts the store: JAX aborts the others without a message as soon as it has ended."""
  store = processes.Store()
  if store.count > 1 and store.process == 0:
    time.sleep(FAREWELL)


def from_flags(coordinator: str | None, count: int | None, process: int | None) -> Placement | None:
  """Return the placement that the three flags define, or None if none of them is given.

  Raises:
    UserError: one of them is missing or invalid.
  """
  given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": process}
  missing = [flag for flag, value in given.items() if value is None]
  if len(missing) == len(given):
    return None
  if missing:
    raise UserError(
      f"{', '.join(given)} must be given together; found no {' and no '.join(missing)}; give all of them or none"
    )
  port = re.fullmatch(r"(?:[^\s:\[\]]+|\[[\da-fA-F:]+\]):(\d+)", coordinator)
  if not port or not 0 < int(port[1]) < 2**16:
    raise UserError(f"--coordinator (={coordinator!r}) must be HOST:PORT; pass e.g. --coordinator=node1:{FIRST_PORT}")
  if count < 1:
    raise UserError(f"--num_processes (={count}) must be at least 1; give the number of processes")
  if not 0 <= process < count:
    raise UserError(f"--process_id (={process}) must be one of 0 to --num_processes - 1 (={count - 1})")
  return Placement(coordinator, count, process)


def from_slurm(environment: Mapping[str, str]) -> Placement | None:
  """Return the placement of a task that `srun` started together with others, or None.

  Process 0 listens on the first node of the step, at a port that follows from the job's number.

  Raises:
    UserError: SLURM defines several tasks, but not which of them this one is, or where.
  """
  tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
  if tasks == "1":
    return None
  try:
    nodes, job, task = (environment[f"SLURM_{name}"] for name in ("STEP_NODELIST", "JOB_ID", "PROCID"))
    port, task, tasks = FIRST_PORT + int(job) % PORTS, int(task), int(tasks)
  except (KeyError, ValueError) as error:
    raise UserError(
      f"SLURM's variables define {tasks} tasks, but not the number or node of this one ({error}); start the tasks "
      "by srun, or pass --coordinator, --num_processes and --process_id"
    ) from error
  first = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]  # node[07,09-12] starts with node07
  return Placement(f"{first}:{port}", tasks, task)
