"""The benchmark runs, small, and its table has what it promises."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import command, imported

from experiments.common import refreshes
from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.layers import LoRADense
from switchlora_jax.methods import FREEZING, METHODS

SMALL = [
  *(f"--config.model.{key}" for key in ("hidden_size=32", "intermediate_size=48", "num_heads=2", "num_layers=1")),
  *("--config.batch_size=2", "--config.seq_len=16", "--config.model.vocab_size=64", "--rank=4"),
]


def rows_of(folder, *flags, **how):
  """(what was printed, {program: row} by its name); `how` as for `command`."""
  out = folder / "out.json"
  done = command("benchmark", *SMALL, *flags, f"--json={out}", **how)
  assert done.returncode == 0, done.stderr
  return done.stdout, {row["program"]: row for row in json.loads(out.read_text())}


@pytest.mark.slow
def test_times_and_operations_of_each_program(tmp_path):
  names = ["switchlora", "galore", "two products", "galore refreshing"]  # each costs seconds to compile
  printed, rows = rows_of(tmp_path, "--repeats=1", f"--methods={','.join(names)}", user_flags=True)
  alone = ["one matrix product", "switching alone, first steps", "switching alone, last steps"]
  assert list(rows) == ["full", *names, *alone]
  assert rows["full"]["time_ratio"] == rows["full"]["operations_ratio"] == 1
  assert all(row["seconds"] > 0 and row["time_ratio"] > 0 and row["vocabulary"] == 64 for row in rows.values())
  assert [row["rank"] for row in rows.values()] == [0, 4, 4, 4, 4, 0, 4, 4]
  operations = {name: row["operations_ratio"] for name, row in rows.items()}
  assert 0 < operations["two products"] < operations["switchlora"] < 1
  assert operations["galore refreshing"] == operations["galore"] > 1  # a decomposition is no matrix product
  optimizer = {name: row["optimizer_ratio"] for name, row in rows.items()}
  assert optimizer["two products"] == optimizer["switchlora"] < optimizer["full"] == 1
  peak = {name: row["peak_ratio"] for name, row in rows.items()}
  assert peak["switchlora"] > peak["two products"] > 0 and peak["full"] == 1
  for ratios in (operations, optimizer, peak):
    assert {ratios[name] for name in alone} == {None}
  assert all(row["gflops"] == rows["full"]["gflops"] for name, row in rows.items() if name not in alone)
  assert rows[alone[0]]["share"] == 1 and rows["full"]["share"] > 0 and rows[alone[1]]["share"] is None
  assert printed.startswith("layers: 1, tokens per step: 2 × 16, one ")
  assert {row["dtype"] for name, row in rows.items() if name not in alone} == {"float32"}
  assert "time_ratio" in printed and "galore refreshing" in printed


@pytest.mark.slow
def test_memory_with_and_without_switching(tmp_path):
  printed, rows = rows_of(tmp_path, "--memory", "--methods=lora,switchlora")
  assert list(rows) == ["full", "lora", "switchlora"]
  assert rows["switchlora"]["arguments"] > rows["lora"]["arguments"] > 0
  assert rows["switchlora"]["optimizer"] == rows["lora"]["optimizer"] < rows["full"]["optimizer"]
  for key in ("optimizer", "peak"):
    assert all(row[f"{key}_ratio"] == row[key] / rows["full"][key] for row in rows.values())
  assert "compiled only" in printed and " MiB" in printed


def cases(*flags):
  """What flags ask for, on one device."""
  with imported("benchmark", *SMALL, *flags) as benchmark:
    return benchmark.make_cases(64, benchmark.make_mesh(jax.devices()[:1]))


@pytest.mark.slow
def test_costs_on_gpus_are_those_of_the_planner(monkeypatch):
  """Compiled here for eight simulated CPUs in place of GPUs, with a micro-batch on each."""
  with imported("benchmark", *SMALL, "--methods=lora", "--gpu=h100") as benchmark:
    mesh = benchmark.make_mesh(jax.devices())
    monkeypatch.setattr(benchmark.topology, "gpu_mesh", lambda gpu, shape: (mesh, f"{gpu} of {shape}"))
    costs, made = benchmark.gpu_costs(64), benchmark.make_cases(64, mesh)
    assert list(costs) == list(made) == [("full", 0), ("lora", 4)]
    assert made["lora", 4].config.batch_size == 16, "two sequences on each device"
    gradients = {
      name: sum(x.size * 4 for x in jax.tree.leaves(case.phase.abstract.params)) for name, case in made.items()
    }
    for name, cost in costs.items():  # a ring sends each byte of an all-reduce 2 · 7/8 times
      assert cost["gpu_sent"] == pytest.approx(2 * 7 / 8 * gradients[name], rel=0.01)
    assert costs["lora", 4]["gpu_sent"] < costs["full", 0]["gpu_sent"] and costs["lora", 4]["gpu_peak"] > 0
    monkeypatch.setattr(benchmark.topology, "gpu_mesh", lambda gpu, shape: None)
    with pytest.raises(UserError, match=r"needs XLA's GPU compiler; install requirements-gpu\.txt"):
      benchmark.gpu_costs(64)


def test_full_rank_is_always_there_and_ranks_may_be_several():
  found = cases("--methods=lora,galore", "--rank=8")
  assert list(found) == [("full", 0), ("lora", 4), ("galore", 4), ("lora", 8), ("galore", 8)]
  assert [case.config.rank for case in found.values()][1:] == [4, 4, 8, 8]


def test_what_each_program_is():
  found = cases("--config.galore.refresh_every=7", "--config.accumulation=2")
  intervals = {name: case.config.galore.refresh_every for (name, _), case in found.items()}
  assert intervals["galore refreshing"] == 1 and intervals["galore"] == 7
  assert {case.config.accumulation for case in found.values()} == {1}
  assert {case.config.method for case in found.values()} == {*METHODS}
  assert [found[name, 4].config.method for name in ("two products", "galore refreshing")] == ["lora", "galore"]


def test_a_program_leaves_the_config_as_it_was_for_the_next():
  found = cases("--config.galore.refresh_every=7", "--methods=galore,galore refreshing", "--rank=4", "--rank=8")
  assert [case.config.galore.refresh_every for case in found.values()] == [7, 7, 1, 7, 1]


def test_a_base_in_16_bits_is_for_the_methods_that_freeze_one():
  found = cases("--config.frozen_dtype=bfloat16", "--config.dtype=bfloat16")
  wide = {name for (name, _), case in found.items() if case.config.frozen_dtype == "float32"}
  assert wide == {*METHODS, *refreshes.PROGRAMS} - {*FREEZING, "relora refreshing"}
  assert {case.config.dtype for case in found.values()} == {"bfloat16"}


def test_the_default_is_the_350m_shape_cut():
  with imported("benchmark") as benchmark:
    config = benchmark.CONFIG.value
    assert (config.model.hidden_size, config.model.num_layers, config.batch_size, config.rank) == (1024, 2, 4, 128)
    assert benchmark.NAMES.value == [*METHODS, "two products", *refreshes.PROGRAMS]


def test_the_layer_it_compares_with_computes_the_same():
  with imported("benchmark") as benchmark:
    kinds = (LoRADense, benchmark.TwoProductDense)
  x = jax.random.normal(jax.random.key(0), (5, 12))
  variables = LoRADense(7, rank=3).init(jax.random.key(1), x)
  merged, usual = (kind(7, rank=3).apply(variables, x) for kind in kinds)
  np.testing.assert_allclose(merged, usual, atol=1e-5)
  assert float(jnp.abs(merged - x @ variables["frozen"]["kernel"]).max()) > 0.1


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (
      ["--methods=full,loar"],
      "--methods has loar; expected some of full, .*, two products, relora refreshing, galore refreshing",
    ),
    (["--methods=switchlora", "--rank=1"], r"rank \(=1\) cannot switch"),
    (["--memory", "--peers=torch"], "--peers and --gpu are columns of the timed table"),
    (["--memory", "--gpu=h100"], "and --memory times nothing; leave out --memory"),
    (["--methods=lora", "--vocabulary=0"], r"model\.vocab_size \(=0\) must be greater than 0"),
  ],
)
def test_mistakes_are_sentences(flags, sentence):
  with imported("benchmark", *SMALL, *flags) as benchmark, pytest.raises(UserError, match=sentence):
    benchmark.main()
