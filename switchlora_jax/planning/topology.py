"""GPUs that are not there: meshes for which XLA's GPU compiler compiles on any machine, and what such GPUs can do.

Compiling needs the GPU extra (requirements-gpu.txt), and `without_gpus()` or its two environment variables
before JAX is first used.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

from jax.experimental import topologies

from switchlora_jax.errors import UserError
from switchlora_jax.parallel.sharding import make_mesh

DESCRIPTIONS = Path(__file__).parent / "gpus"


class Gpu(NamedTuple):
  """What a GPU can do; the units stand in gpus/gpus.toml.

  Attributes:
    memory: bytes. bandwidth: of the memory, nvlink: within a host, network: to other hosts, all bytes a second.
    peak: {dtype: operations a second}.
  """

  memory: int
  bandwidth: float
  nvlink: float
  network: float
  peak: dict[str, float]


def known() -> list[str]:
  """The GPUs that are described."""
  return sorted(path.stem for path in DESCRIPTIONS.glob("*.textproto"))


def check(gpu: str):
  """Raise `UserError` unless there is a description of the GPU; lists those there are."""
  if gpu not in known():
    raise UserError(f"no description of GPU {gpu!r}; there is {', '.join(known())}; add one to {DESCRIPTIONS.name}/")


def figures(gpu: str) -> Gpu:
  """What a GPU can do, by its name.

  Raises:
    UserError: no such description.
  """
  check(gpu)
  return Gpu(**tomllib.loads((DESCRIPTIONS / "gpus.toml").read_text())[gpu])


def parse(shape: str) -> tuple[int, int]:
  """How many GPUs there are in all, and how many in a host: `1x2x8` is 1 slice of 2 hosts with 8 each, (16, 8).

  Raises:
    UserError: the shape is none.
  """
  sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", shape)
  if not sides:
    raise UserError(f"a topology is slices × hosts × GPUs of a host, say 1x2x8 for 16 GPUs; found {shape!r}")
  slices, hosts, gpus = map(int, sides.groups())
  return slices * hosts * gpus, gpus


def without_gpus():
  """Let this process compile for GPUs that are not there, and look for none. Before JAX is first used."""
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the check wants a driver
  os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # where there are GPUs, others may be using them


def gpu_mesh(gpu: str, shape: str = "1x1x1", fsdp: int = 1):
  """(mesh of absent GPUs, what compiles for it), or None where the CUDA plugin is not installed.

  Args:
    gpu: the name of a file in `gpus/`. shape: see `parse`. fsdp: see `sharding.make_mesh`.
  Raises:
    UserError: no such description or shape.
  """
  check(gpu)
  parse(shape)
  target = (DESCRIPTIONS / f"{gpu}.textproto").read_text()
  try:
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
  except NotImplementedError:
    return None
  return make_mesh(found.devices, fsdp), f"XLA for {found.devices[0].device_kind}"
