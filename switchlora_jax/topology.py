"""GPUs that are not there: meshes for which XLA's GPU compiler compiles on any machine.

Needs the GPU extra (requirements-gpu.txt) and three environment variables, which must be set before
JAX is first used: JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 CUDA_VISIBLE_DEVICES=-1 JAX_PLATFORMS=""
"""

from pathlib import Path

from jax.experimental import topologies

from switchlora_jax.errors import UserError
from switchlora_jax.sharding import make_mesh

DESCRIPTIONS = Path(__file__).parent / "gpus"


def gpu_mesh(gpu: str, shape: str = "1x1x1", fsdp: int = 1):
  """(mesh of absent GPUs, what compiles for it), or None where the CUDA plugin is not installed.

  Args:
    gpu: the name of a file in `gpus/`. shape: hosts, as `1x2x8`: 1 slice of 2 hosts with 8 GPUs each.
    fsdp: devices along the mesh's second axis, see `sharding.make_mesh`.
  Raises:
    UserError: no such description; lists those there are.
  """
  known = sorted(path.stem for path in DESCRIPTIONS.glob("*.textproto"))
  if gpu not in known:
    raise UserError(f"no description of GPU {gpu!r}; there is {', '.join(known)}; add one to {DESCRIPTIONS.name}/")
  target = (DESCRIPTIONS / f"{gpu}.textproto").read_text()
  try:
    found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
  except NotImplementedError:
    return None
  return make_mesh(found.devices, fsdp), f"XLA for {found.devices[0].device_kind}"
