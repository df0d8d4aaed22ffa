"""The study of drift, small: how much each storage format drifts, and the files of the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import command, imported

from switchlora_jax.analysis import drift
from switchlora_jax.lowrank.switching import SwitchSchedule

SMALL = drift.Setting(48, 8, SwitchSchedule(8, freeze_steps=0, total_steps=1200, decay_to=1.0), steps=1200)
PLAIN, RESIDUAL = "bfloat16", "bfloat16 + int8 residual"


@pytest.fixture(scope="module")
def found():
  return drift.drifts(SMALL, 4)


@pytest.mark.slow
def test_a_vector_a_side_is_switched_in_every_step(found):
  assert found["switched"] == [300, 600, 900, 1200]


@pytest.mark.slow
def test_plain_bfloat16_drifts_far_more_than_with_a_residual(found):
  """A residual has 8 bits more: 256 times less is lost at every switch."""
  plain, tail = np.array(found[PLAIN]), np.array(found[RESIDUAL])
  assert plain[-1] > 0.05 and np.all(tail <= 0.01 * plain) and tail[-1] > 0
  assert np.all(np.diff(plain) > 0), "it adds up"


@pytest.mark.slow
def test_rounding_at_random_is_no_remedy(found):
  assert found[drift.STOCHASTIC][-1] > 0.05


def test_rounding_at_random_has_the_right_mean_and_keeps_what_is_rounded():
  value = np.float32(1 + 2**-7 / 3)
  many = np.asarray(drift.round_stochastically(jax.random.key(0), jnp.full(30_000, value)))
  assert set(many) == {1, 1 + 2**-7} and abs(many.mean() - value) < 5 * 2**-7 * (2 / 9 / 30_000) ** 0.5
  assert np.array_equal(drift.round_stochastically(jax.random.key(1), many), many)


@pytest.mark.slow
def test_all_storages_see_the_same_vectors(monkeypatch):
  """Without kernels that can be told apart, nothing drifts."""
  monkeypatch.setitem(drift.FORMATS, PLAIN, {})
  found = drift.drifts(SMALL._replace(steps=40), 2)
  assert found[PLAIN] == [0, 0] and found[RESIDUAL][1] > 0


@pytest.mark.slow
def test_the_command_leaves_numbers_and_a_picture(tmp_path):
  done = command("drift", "--switches=8", "--size=16", "--rank=4", f"--workdir={tmp_path / 'new'}")
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "new" / "drift.json").read_text())
  assert [len(found["switched"]) for found in results.values()] == [8, 8]
  assert all(title in done.stdout for title in results) and RESIDUAL in done.stdout
  assert (tmp_path / "new" / "drift.png").stat().st_size > 10_000


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    ([], "--workdir is missing"),
    (["--workdir=x", "--switches=7"], r"--switches \(=7\) must be at least 8"),
    (["--workdir=/dev/null/x"], "cannot create the folder /dev/null/x"),
    (["--workdir=x", "--size=32"], r"--size \(=32\) more than --rank \(=32\)"),
  ],
)
def test_mistakes_are_sentences(flags, sentence):
  with imported("drift", *flags) as module, pytest.raises(module.UserError, match=sentence):
    module.main()
