"""Descriptions of GPUs; compiling for them needs the GPU extra, and says so by returning nothing."""

import pytest

from switchlora_jax import topology
from switchlora_jax.errors import UserError


def test_an_unknown_gpu_lists_those_there_are():
  with pytest.raises(UserError, match="no description of GPU 'h42'; there is h100"):
    topology.gpu_mesh("h42")


def test_without_the_gpu_extra_there_is_no_mesh():
  found = topology.gpu_mesh("h100")
  assert found is None or "H100" in found[1]
