"""Fixtures of the tests of warm starts."""

import pytest
import small_model

from switchlora_jax.training import trainer


def scales(first):
  """Replaces the effective rank, which compiles slowly; returns a number that encodes the two scales it gets."""
  return lambda params, frozen, scale: 100 * (first.scale or 0) + (scale or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with the text of all runs of a module. The runs use one device and compute no effective rank."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "make_mesh", lambda **_: small_model.mesh(1))
    patch.setattr(trainer, "make_learnt_rank", scales)
    yield tmp_path_factory.mktemp("runs")
