"""Descriptions of GPUs; compiling for them needs the GPU extra, and says so by returning nothing."""

import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

from switchlora_jax.errors import UserError
from switchlora_jax.planning import topology


def test_an_unknown_gpu_lists_those_there_are():
  for ask in (topology.gpu_mesh, topology.read_gpu):
    with pytest.raises(UserError, match="no description of GPU 'h42'; expected one of a100, a100-40, h100, h200"):
      ask("h42")


def test_without_the_gpu_extra_there_is_no_mesh():
  found = topology.gpu_mesh("h100")
  assert found is None or "H100" in found[1]


@pytest.mark.parametrize(("shape", "parsed"), [("1x1x8", (8, 8)), ("1x2x8", (16, 8)), ("2x3x4", (24, 4))])
def test_a_topology_is_slices_hosts_and_gpus(shape, parsed):
  assert topology.parse_topology(shape) == parsed


@pytest.mark.parametrize("shape", ["8", "1x8", "1x0x8", "1x1x8x1", "1x1x-8", "axbxc", ""])
def test_a_malformed_topology_says_what_one_is(shape):
  for ask in (topology.parse_topology, lambda shape: topology.gpu_mesh("h100", shape)):
    with pytest.raises(UserError, match=f"slices × hosts × GPUs per host, such as 1x2x8 for 16 GPUs; found '{shape}'"):
      ask(shape)


@pytest.mark.parametrize("gpu", topology.known_gpus())
def test_figures_are_those_that_the_compiler_is_told(gpu):
  """The memory exactly; the bandwidth to the 1% by which data sheets round."""
  told = dict(re.findall(r"(\w+): (\d+)", (topology.DESCRIPTIONS / f"{gpu}.textproto").read_text()))
  figures = topology.read_gpu(gpu)
  assert figures.memory == int(told["device_memory_size"])
  assert figures.bandwidth == pytest.approx(int(told["memory_bandwidth"]), rel=0.01)
  assert set(figures.peak) == {"bfloat16", "float32", "float64"}
  assert figures.peak["bfloat16"] > figures.peak["float32"] > figures.peak["float64"]
  assert figures.nvlink > figures.network


def test_what_the_environment_says_is_kept(monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
  monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")  # so that it is taken back
  monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
  topology.without_gpus()
  assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"]) == ("3", "1")


def clean() -> dict[str, str]:
  """The environment without what tells JAX of devices."""
  return {key: value for key, value in os.environ.items() if not key.startswith(("JAX", "CUDA"))}


COLLECT = """
import jax
from switchlora_jax.planning import topology
topology.without_gpus()
for gpu in topology.known_gpus():
  mesh, compiler = topology.gpu_mesh(gpu, "1x2x4") or (None, "nothing")
  print(gpu, compiler)
  if mesh:
    x = jax.ShapeDtypeStruct((64, 64), "float32", sharding=jax.NamedSharding(mesh, jax.P("data")))
    assert "all-gather" in jax.jit(lambda x: x @ x).lower(x).compile().as_text()
"""


def test_every_gpu_compiles_without_any_environment():
  """In a process of its own, whose JAX has not been used."""
  done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, env=clean(), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  if "nothing" in done.stdout:
    pytest.skip("the GPU extra (requirements-gpu.txt) is not installed")
  for gpu, line in zip(topology.known_gpus(), done.stdout.splitlines(), strict=True):
    assert line.startswith(f"{gpu} XLA for NVIDIA {gpu.split('-')[0].upper()}")


STEP = """
import sys; sys.path[:0] = [".", "tests/helpers"]
import jax, jax.numpy as jnp, small_model
from switchlora_jax.planning import topology
from switchlora_jax.config import resolve
from switchlora_jax.training.phases import build_phase
topology.without_gpus()
mesh, _ = topology.gpu_mesh("h100") or exit("no GPU compiler")
for remat in ("none", "linear", "full"):
  config = small_model.config(dtype="bfloat16", remat=remat, model__hidden_size=32)
  program = build_phase(resolve(config, 1), mesh)
  step = program.step.lower(program.abstract, jax.ShapeDtypeStruct((16, 8), jnp.int32)).compile().as_text()
  print(remat, *(step.count(f'custom_call_target="__cudnn$fmhaSoftmax{end}"') for end in ("", "Backward")))
"""


def test_a_step_for_gpus_attends_by_cudnn():
  """Once forward and once backward for all layers; where it is recomputed, once more."""
  done = subprocess.run([sys.executable, "-c", STEP], cwd=ROOT, env=clean(), capture_output=True, text=True)
  if "no GPU compiler" in done.stderr:
    pytest.skip("needs the GPU extra")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == ["none 1 1", "linear 2 1", "full 2 1"]
