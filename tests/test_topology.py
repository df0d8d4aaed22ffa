"""Descriptions of GPUs; compiling for them needs the GPU extra, and says so by returning nothing."""

import os
import subprocess
import sys

import pytest
from grids import ROOT

from switchlora_jax import topology
from switchlora_jax.errors import UserError


def test_an_unknown_gpu_lists_those_there_are():
  with pytest.raises(UserError, match="no description of GPU 'h42'; there is h100"):
    topology.gpu_mesh("h42")


def test_without_the_gpu_extra_there_is_no_mesh():
  found = topology.gpu_mesh("h100")
  assert found is None or "H100" in found[1]


GPU = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": ""}
COMPILE = """
import sys; sys.path[:0] = [".", "tests"]
import jax, jax.numpy as jnp, small_model
from switchlora_jax import topology
from switchlora_jax.config import resolve
from switchlora_jax.program import build
mesh, _ = topology.gpu_mesh("h100") or exit("no GPU compiler")
for remat in ("none", "linear", "full"):
  config = small_model.config(dtype="bfloat16", remat=remat, model__hidden_size=32)
  program = build(resolve(config, 1), mesh)
  step = program.step.lower(program.abstract, jax.ShapeDtypeStruct((16, 8), jnp.int32)).compile().as_text()
  print(remat, *(step.count(f'custom_call_target="__cudnn$fmhaSoftmax{end}"') for end in ("", "Backward")))
"""


def test_a_step_for_gpus_attends_by_cudnn():
  """Once forward and once backward for all layers; where it is recomputed, once more."""
  done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=os.environ | GPU, capture_output=True, text=True)
  if "no GPU compiler" in done.stderr:
    pytest.skip("needs the GPU extra")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == ["none 1 1", "linear 2 1", "full 2 1"]
