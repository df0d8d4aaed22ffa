"""Descriptions of GPUs, and compilation for them. Without the GPU extra, `gpu_mesh` returns None."""

import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

from switchlora_jax.errors import UserError
from switchlora_jax.planning import topology


def test_an_unknown_gpu_lists_the_known_ones():
  for function in (topology.gpu_mesh, topology.read_gpu):
    with pytest.raises(UserError, match="no description of GPU 'h42'; expected one of a100, a100-40, h100, h200"):
      function("h42")


def test_without_the_gpu_extra_there_is_no_mesh():
  found = topology.gpu_mesh("h100")
  assert found is None or "H100" in found[1]


@pytest.mark.parametrize(("shape", "parsed"), [("1x1x8", (8, 8)), ("1x2x8", (16, 8)), ("2x3x4", (24, 4))])
def test_a_topology_is_slices_hosts_and_gpus(shape, parsed):
  assert topology.parse_topology(shape) == parsed


@pytest.mark.parametrize("shape", ["8", "1x8", "1x0x8", "1x1x8x1", "1x1x-8", "axbxc", ""])
def test_a_malformed_topology_names_the_format(shape):
  for function in (topology.parse_topology, lambda shape: topology.gpu_mesh("h100", shape)):
    with pytest.raises(UserError, match=f"slices × hosts × GPUs per host, such as 1x2x8 for 16 GPUs; found '{shape}'"):
      function(shape)


@pytest.mark.parametrize("gpu", topology.known_gpus())
def test_figures_match_the_description_for_the_compiler(gpu):
  """Memory matches exactly, bandwidth to 1%, since data sheets round it."""
  described = dict(re.findall(r"(\w+): (\d+)", (topology.DESCRIPTIONS / f"{gpu}.textproto").read_text()))
  figures = topology.read_gpu(gpu)
  assert figures.memory == int(described["device_memory_size"])
  assert figures.bandwidth == pytest.approx(int(described["memory_bandwidth"]), rel=0.01)
  assert set(figures.peak) == {"bfloat16", "float32", "float64"}
  assert figures.peak["bfloat16"] > figures.peak["float32"] > figures.peak["float64"]
  assert figures.nvlink > figures.network


def test_the_peak_of_a_device_is_that_of_its_type():
  """Names as JAX gives them."""
  assert topology.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == topology.read_gpu("h100").peak["bfloat16"]
  assert topology.peak_flops("NVIDIA A100-SXM4-40GB", "float32") == topology.read_gpu("a100").peak["float32"]
  assert topology.peak_flops("cpu", "float32") is None and topology.peak_flops("NVIDIA H200", "float16") is None


def test_without_gpus_keeps_variables_that_are_set(monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
  monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")  # so that monkeypatch restores it
  monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
  topology.without_gpus()
  assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"]) == ("3", "1")


def clean_environment() -> dict[str, str]:
  """The environment without variables that select JAX's devices."""
  return {key: value for key, value in os.environ.items() if not key.startswith(("JAX", "CUDA"))}


COMPILE_ALL_GATHERS = """
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


def test_every_gpu_compiles_without_environment_variables():
  """Runs in a subprocess, where JAX has no devices yet."""
  done = subprocess.run(
    [sys.executable, "-c", COMPILE_ALL_GATHERS], cwd=ROOT, env=clean_environment(), capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  if "nothing" in done.stdout:
    pytest.skip("the GPU extra (requirements-gpu.txt) is not installed")
  for gpu, line in zip(topology.known_gpus(), done.stdout.splitlines(), strict=True):
    assert line.startswith(f"{gpu} XLA for NVIDIA {gpu.split('-')[0].upper()}")


COMPILE_STEPS = """
import sys; sys.path[:0] = [".", "tests/helpers"]
import jax, jax.numpy as jnp, small_model
from switchlora_jax.planning import topology
from switchlora_jax.config import resolve
from switchlora_jax.training.phases import build_phase
topology.without_gpus()
mesh, _ = topology.gpu_mesh("h100") or exit("no GPU compiler")
for remat in ("none", "linear", "full"):
  config = small_model.config(dtype="bfloat16", remat=remat, model__hidden_size=32)
  phase = build_phase(resolve(config, 1), mesh)
  step = phase.step.lower(phase.abstract, jax.ShapeDtypeStruct((16, 8), jnp.int32)).compile().as_text()
  print(remat, *(step.count(f'custom_call_target="__cudnn$fmhaSoftmax{end}"') for end in ("", "Backward")))
"""


def test_a_step_for_gpus_uses_cudnn_attention():
  """One forward and one backward call for all layers, and one more forward call with rematerialization."""
  done = subprocess.run(
    [sys.executable, "-c", COMPILE_STEPS], cwd=ROOT, env=clean_environment(), capture_output=True, text=True
  )
  if "no GPU compiler" in done.stderr:
    pytest.skip("needs the GPU extra")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == ["none 1 1", "linear 2 1", "full 2 1"]
