"""GPU types: meshes for which XLA compiles without a GPU, and peak figures.

Compiling needs the GPU extra (requirements-gpu.txt), and `without_gpus()` or its two environment variables
before JAX is first used.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from switchlora_jax.errors import UserError
from switchlora_jax.parallel.sharding import make_mesh

DESCRIPTIONS = Path(__file__).parent / "gpus"


class Gpu(NamedTuple):
  """Peak figures of a GPU type, from gpus/gpus.toml.

  Attributes:
    memory: bytes.
    bandwidth: of the memory, bytes per second.
    nvlink: between GPUs of a host, bytes per second in one direction.
    network: to other hosts, bytes per second in one direction.
    peak: {dtype: operations per second}.
  """

  memory: int
  bandwidth: float
  nvlink: float
  network: float
  peak: dict[str, float]


def known_gpus() -> list[str]:
  """Names of the GPU types that have a description."""
  return sorted(path.stem for path in DESCRIPTIONS.glob("*.textproto"))


def check_gpu(gpu: str) -> None:
  """Raise `UserError` if a GPU type has no description; the message lists the known types."""
  if gpu not in known_gpus():
    raise UserError(
      f"no description of GPU {gpu!r}; expected one of {', '.join(known_gpus())}; or add it to {DESCRIPTIONS.name}/"
    )


def read_gpu(gpu: str) -> Gpu:
  """The figures of a GPU type, by its name.

  Raises:
    UserError: the GPU type has no description.
  """
  check_gpu(gpu)
  return Gpu(**tomllib.loads((DESCRIPTIONS / "gpus.toml").read_text())[gpu])


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Peak operations per second of a device in a dtype, as an SXM board; None if its type has no description.

  Args:
    device_kind: the name that JAX gives the type, such as "NVIDIA H100 80GB HBM3".
  """
  found = [gpu for gpu in known_gpus() if gpu in device_kind.lower()]
  return read_gpu(found[0]).peak.get(dtype) if found else None


def parse_topology(shape: str) -> tuple[int, int]:
  """(number of GPUs, GPUs per host) of a topology: `1x2x8`, 1 slice of 2 hosts with 8 GPUs each, is (16, 8).

  Raises:
    UserError: the topology is malformed.
  """
  sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", shape)
  if not sides:
    raise UserError(f"a topology must be slices × hosts × GPUs per host, such as 1x2x8 for 16 GPUs; found {shape!r}")
  slices, hosts, gpus = map(int, sides.groups())
  return slices * hosts * gpus, gpus


def without_gpus():
  """Let this process compile for GPUs without a driver, and hide its own GPUs. Call it before JAX is first used."""
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the check needs a driver
  os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # this machine's GPUs may be in use


def gpu_mesh(gpu: str, shape: str = "1x1x1", fsdp: int = 1):
  """(mesh of described GPUs, name of the compiler), or None if the CUDA plugin is not installed.

  Switches off JAX's persistent compilation cache in this process.

  Args:
    gpu: the name of a file in `gpus/`.
    shape: see `parse_topology`.
    fsdp: see `sharding.make_mesh`.
  Raises:
    UserError: the GPU type has no description, or the topology is malformed.
  """
  check_gpu(gpu)
  parse_topology(shape)
  target = (DESCRIPTIONS / f"{gpu}.textproto").read_text()
  try:
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
  except NotImplementedError:
    return None
  # A program for devices that do not exist can be stored, but not read: reading it would load it onto them.
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # JAX may have decided before that it uses the cache
  return make_mesh(found.devices, fsdp), f"XLA for {found.devices[0].device_kind}"
