"""The mesh, and where arrays live on it: data-parallel, the state replicated, batches split by rows."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

DATA = "data"


def make_mesh() -> jax.sharding.Mesh:
  """One axis over all visible devices."""
  return jax.make_mesh((jax.device_count(),), (DATA,), axis_types=(jax.sharding.AxisType.Auto,))


def replicated(mesh) -> NamedSharding:
  """For the train state: a copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh) -> NamedSharding:
  """For batches [rows, length]: each device has its share of the rows."""
  return NamedSharding(mesh, PartitionSpec(DATA))
