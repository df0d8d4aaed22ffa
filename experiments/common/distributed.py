"""How the processes of one run find each other: from three flags, or from SLURM."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
from absl import flags

from experiments.common.rendezvous import meet
from switchlora_jax.errors import UserError
from switchlora_jax.parallel import processes

FIRST_PORT, PORTS = 61440, 4096  # above the ports that Linux hands out by itself


class Place(NamedTuple):
  """Where one process stands: HOST:PORT at which process 0 listens, how many there are, which one this is."""

  coordinator: str
  processes: int
  process: int


def define_flags():
  """The flags of a command that several processes may run together."""
  flags.DEFINE_string("coordinator", None, "HOST:PORT at which process 0 listens; the same on all processes")
  flags.DEFINE_integer("num_processes", None, "processes that run this command together; the same on all of them")
  flags.DEFINE_integer("process_id", None, "which of them this one is, from 0")
  flags.DEFINE_integer(
    "coordinator_timeout", 300, "seconds that processes wait for each other to start", lower_bound=1, upper_bound=10**6
  )
  flags.DEFINE_integer(
    "peer_timeout", 60, "seconds without a sign of life after which another process is taken for lost", lower_bound=5
  )


def join() -> None:
  """Become one of several processes, if flags or SLURM say so; must come before any use of a device.

  Raises:
    UserError: the flags make no sense, the processes do not come together, or their devices do not match.
  """
  values = flags.FLAGS
  place = from_flags(values.coordinator, values.num_processes, values.process_id) or from_slurm(os.environ)
  if place is None or place.processes == 1:
    return
  meet(*place, values.coordinator_timeout)
  # It takes every SIGTERM, that of set-up and the second one as well: see switchlora_jax/parallel/preemption.py.
  jax.config.update("jax_enable_preemption_service", False)
  # All devices that this process sees, []; JAX by itself takes one GPU a SLURM task.
  # JAX aborts without a sentence: it comes after the watchdog, which has one.
  patience = dict(heartbeat_timeout_seconds=values.peer_timeout + 30, shutdown_timeout_seconds=60)
  jax.distributed.initialize(*place, local_device_ids=[], **patience)
  processes.check_devices()
  print(processes.describe_process(), flush=True)


def from_flags(coordinator: str | None, count: int | None, process: int | None) -> Place | None:
  """The place that the three flags describe, or None where none of them is given.

  Raises:
    UserError: one is missing or makes no sense.
  """
  given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": process}
  missing = [flag for flag, value in given.items() if value is None]
  if len(missing) == len(given):
    return None
  if missing:
    raise UserError(f"{', '.join(given)} go together; found no {' and no '.join(missing)}; give all of them or none")
  port = re.fullmatch(r"(?:[^\s:\[\]]+|\[[\da-fA-F:]+\]):(\d+)", coordinator)
  if not port or not 0 < int(port[1]) < 2**16:
    raise UserError(f"--coordinator (={coordinator!r}) must be HOST:PORT; pass e.g. --coordinator=node1:{FIRST_PORT}")
  if count < 1:
    raise UserError(f"--num_processes (={count}) must be at least 1; give the number of processes")
  if not 0 <= process < count:
    raise UserError(f"--process_id (={process}) must be one of 0 to --num_processes - 1 (={count - 1})")
  return Place(coordinator, count, process)


def from_slurm(environment: Mapping[str, str]) -> Place | None:
  """The place of a task that `srun` started with others, or None.

  The first node of the step listens, at a port that follows from the job's number.
  """
  tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
  if tasks == "1":
    return None
  try:
    nodes, job, task = (environment[f"SLURM_{name}"] for name in ("STEP_NODELIST", "JOB_ID", "PROCID"))
    port, task, tasks = FIRST_PORT + int(job) % PORTS, int(task), int(tasks)
  except (KeyError, ValueError) as error:
    raise UserError(
      f"SLURM says that this is one of {tasks} tasks, and not which, or where ({error}); start them by srun, "
      "or pass --coordinator, --num_processes and --process_id"
    ) from error
  first = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]  # node[07,09-12] begins with node07
  return Place(f"{first}:{port}", tasks, task)
