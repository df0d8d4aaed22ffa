"""The mesh, and where arrays live on it: data-parallel, the state replicated, batches split by rows."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

DATA = "data"


def make_mesh(devices=None) -> jax.sharding.Mesh:
  """One axis over `devices`, by default all that are visible."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), (DATA,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def replicated(mesh) -> NamedSharding:
  """For the train state: a copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh) -> NamedSharding:
  """For batches [rows, length]: each device has its share of the rows."""
  return NamedSharding(mesh, PartitionSpec(DATA))
