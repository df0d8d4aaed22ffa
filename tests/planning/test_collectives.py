"""Collectives in the text of compiled functions: compiled here for CPUs, and as XLA prints them for GPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from switchlora_jax.planning.collectives import Collective, collectives

EIGHT = (tuple(range(8)),)
SHARDED, REPLICATED = P("data"), P()


def compiled(local, x, in_specs=SHARDED, out_specs=REPLICATED, shape=(8,), names=("data",)):
  """The collectives of `local`, compiled for eight devices."""
  mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
  mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
  return collectives(jax.jit(mapped).lower(x).compile().as_text(), 8)


def loop(length, body):
  """A loop of `length` iterations, each of which depends on the one before."""
  return lambda x: jax.lax.scan(lambda x, _: (body(x), None), x, length=length)[0]


def reduced(x):
  return jnp.tanh(jax.lax.psum(x, "data"))


# --- compiled here ------------------------------------------------------------------------------------------------


def test_one_reduction():
  """Each of 8 devices has 3 of 24 float32 numbers: 12 bytes."""
  assert compiled(reduced, jnp.ones(24)) == [Collective("all-reduce", 12, EIGHT, 1, True)]


def test_a_reduction_in_a_loop_counts_once_per_iteration():
  assert compiled(loop(7, reduced), jnp.ones(24)) == [Collective("all-reduce", 12, EIGHT, 7, True)]


def test_trip_counts_of_nested_loops_multiply():
  assert compiled(loop(3, loop(7, reduced)), jnp.ones(24)) == [Collective("all-reduce", 12, EIGHT, 21, True)]


def test_gather_and_scatter_count_the_complete_array():
  """[16, 4] in float32: gathered from 2 rows per device; reduced and scattered from 16 rows on every device."""
  x = jnp.ones((16, 4))
  (gather,) = compiled(lambda x: jax.lax.all_gather(x, "data"), x)
  (scatter,) = compiled(lambda x: jax.lax.psum_scatter(x, "data", tiled=True), x, REPLICATED, SHARDED)
  assert gather == Collective("all-gather", 256, EIGHT, 1, True)
  assert scatter == Collective("reduce-scatter", 256, EIGHT, 1, True)


def test_an_exchange_and_a_permutation():
  x = jnp.ones((64, 4))
  (exchange,) = compiled(lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), x, SHARDED, SHARDED)
  (permutation,) = compiled(lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 2)]), x, SHARDED, SHARDED)
  assert exchange == Collective("all-to-all", 128, EIGHT, 1, True)
  assert permutation == Collective("collective-permute", 128, ((0, 1), (1, 2)), 1, True)


def test_groups_are_the_devices_along_an_axis():
  mesh = dict(in_specs=P("slow", "fast"), shape=(2, 4), names=("slow", "fast"))
  x = jnp.ones((2, 12))
  (fast,) = compiled(lambda x: jax.lax.psum(x, "fast"), x, out_specs=P("slow"), **mesh)
  (slow,) = compiled(lambda x: jax.lax.psum(x, "slow"), x, out_specs=P(None, "fast"), **mesh)
  assert fast.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
  assert slow.groups == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_a_loop_with_unknown_trip_count_is_one_uncertain_iteration():
  def local(x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, reduced, x)

  found = compiled(local, jnp.ones(24))
  assert [(one.times, one.certain) for one in found if one.size == 12] == [(1, False)]


def test_both_branches_of_a_conditional_count():
  def local(x):
    return jax.lax.cond(jnp.sum(x) > 1, reduced, lambda x: jax.lax.psum(jnp.concatenate([x, x]), "data")[:3], x)

  assert sorted(one.size for one in compiled(local, jnp.ones(24))) == [12, 24]


def test_a_function_without_communication_has_no_collectives():
  assert compiled(jnp.tanh, jnp.ones(24), out_specs=SHARDED) == []


# --- as printed for GPUs ------------------------------------------------------------------------------------------

ENTRY = "ENTRY %main (p: f32[64,300]) -> f32[300] {\n  %x = TYPE KIND(%p), channel_id=1, GROUPS, dimensions={0}\n}\n"
LISTED = "replica_groups={{0,1,2,3,4,5,6,7}}"


@pytest.mark.parametrize(
  ("kind", "printed", "size"),
  [
    ("all-reduce-start", "f32[300]{0}", 1200),
    ("all-reduce-start", "(f32[300]{0}, bf16[4,2]{1,0}, /*index=2*/f32[])", 1220),
    ("all-gather-start", "(f32[1,64,300]{2,1,0}, f32[8,64,300]{2,1,0})", 614400),
    ("all-gather-start", "((f32[2]{0}, f32[3]{0}), (f32[16]{0}, f32[24]{0}))", 160),
    ("reduce-scatter-start", "((f32[64,300]{1,0}), f32[8,300]{1,0})", 76800),
    ("all-to-all-start", "((f32[64,300]{1,0}), f32[64,300]{1,0})", 76800),
    ("collective-permute-start", "(f32[64,300]{1,0}, f32[64,300]{1,0}, u32[], u32[])", 76800),
    ("all-reduce", "(f32[300]{0:T(256)}, pred[7]{0}, f8e4m3fn[5]{0}, token[])", 1212),
    ("all-reduce-done", "f32[300]{0}", None),
  ],
)
def test_sizes_as_printed(kind, printed, size):
  text = ENTRY.replace("TYPE", printed).replace("KIND", kind).replace("GROUPS", LISTED)
  assert [one.size for one in collectives(text, 8)] == ([] if size is None else [size])


@pytest.mark.parametrize(
  ("printed", "groups"),
  [
    ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
    ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups={}", EIGHT),
    ("use_global_device_ids=true", EIGHT),
  ],
)
def test_groups_as_printed(printed, groups):
  text = ENTRY.replace("TYPE", "f32[2]").replace("KIND", "all-reduce").replace("GROUPS", printed)
  assert [one.groups for one in collectives(text, 8)] == [groups]


# --- bytes sent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kind", "sent"),
  [("all-reduce", 150.0), ("all-gather", 75.0), ("reduce-scatter", 75.0), ("all-to-all", 75.0)],
)
def test_bytes_sent_per_device(kind, sent):
  """Collectives of 100 bytes among 4 devices."""
  assert Collective(kind, 100, ((0, 1, 2, 3),), 1, True).sent == sent
  assert Collective(kind, 100, ((0, 1, 2, 3),), 3, True).sent == 3 * sent
  assert Collective(kind, 100, ((0,),), 1, True).sent == 0


def test_a_permutation_sends_the_complete_array():
  assert Collective("collective-permute", 100, ((0, 1), (1, 0)), 2, True).sent == 200
