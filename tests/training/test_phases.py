"""The phases of a run: which phase makes a step, and which phase a state belongs to."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import resolved

from switchlora_jax.methods import LOW_RANK, METHODS
from switchlora_jax.parallel.sharding import by_rows, make_mesh
from switchlora_jax.training import phases, warm_start
from switchlora_jax.training.phases import Phase, build_phase, build_phases, full_rank_config, phase_at, shard_batch

pytestmark = pytest.mark.two_linear_layers

# --- which phase --------------------------------------------------------------------------------------------------


def named(name, start):
  """A phase with only a start, and a name in place of its model."""
  return Phase(name, *[None] * (len(Phase._fields) - 2), start)


@given(st.integers(1, 30), st.integers(1, 30))
def test_a_state_belongs_to_the_phase_of_the_step_before(warm_start_steps, steps):
  """Step t makes the state before step t + 1. Steps t < K are full rank, later ones use the low-rank method."""
  both = [named("full", 0), named("main", warm_start_steps)]
  trained = ["full" if t < warm_start_steps else "main" for t in range(steps)]
  assert [phase_at(both, t + 1).model for t in range(steps)] == trained
  assert phase_at(both, 0).model == "full", "the first phase creates the state before step 0"


@given(st.integers(0, 30))
def test_without_a_warm_start_all_states_belong_to_one_phase(step):
  assert phase_at([named("main", 0)], step).model == "main"


@pytest.mark.parametrize("method", (*LOW_RANK, "apollo_mini"))
def test_a_warm_start_is_a_separate_phase(method, tmp_path):
  shape = dict(method=method, learning_rate=0.5, min_lr_ratio=0.3)
  config = resolved(tmp_path, **shape, warm_start_steps=5)
  first, main = build_phases(config, make_mesh())
  (only,) = build_phases(resolved(tmp_path, **shape), make_mesh())
  assert (first.start, main.start, only.start) == (0, 5, 0)
  assert (first.scale, main.scale) == (None, METHODS[method].build(config).scale)
  assert first.abstract.frozen == first.abstract.candidates == {}
  assert main.abstract == only.abstract
  assert main.abstract.opt_state != first.abstract.opt_state


@pytest.mark.parametrize("method", (*LOW_RANK, "apollo_mini"))
def test_the_first_phase_is_the_full_method_with_its_own_learning_rate(method, tmp_path):
  """It also has its own warm-up, over the same horizon. All other keys of full rank are those of the run."""
  shape = dict(method=method, learning_rate=0.5, min_lr_ratio=0.3, warm_start_steps=5)
  config = resolved(tmp_path, **shape)
  assert full_rank_config(config).to_dict() == resolved(tmp_path, method="full").to_dict()
  assert full_rank_config(config).learning_rate == 1e-3
  assert (
    build_phases(config, make_mesh())[0].abstract
    == build_phase(resolved(tmp_path, method="full"), make_mesh()).abstract
  )
  slow = dict(warm_start_learning_rate=0.25)
  full = resolved(tmp_path, method="full", learning_rate=0.25, **slow)
  assert full_rank_config(resolved(tmp_path, **shape, **slow)).to_dict() == full.to_dict()
  rest = dict(warm_start_rest_learning_rate=0.125)
  full = resolved(tmp_path, method="full", rest_learning_rate=0.125, **rest)
  assert full_rank_config(resolved(tmp_path, **shape, rest_learning_rate=0.7, **rest)).to_dict() == full.to_dict()
  for steps in (0, 4):
    full = resolved(tmp_path, method="full", warmup_steps=steps)
    assert full_rank_config(resolved(tmp_path, **shape, warm_start_warmup_steps=steps)).to_dict() == full.to_dict()


def test_each_device_gets_its_shard_of_the_batch(tmp_path):
  class Rows:
    shape, parts = (16, 3), []

    def __getitem__(self, part):
      self.parts.append(range(16)[part])
      return np.arange(48).reshape(self.shape)[part]

  placed = shard_batch(make_mesh(), Rows())
  assert sorted(map(list, Rows.parts)) == [[2 * i, 2 * i + 1] for i in range(8)]
  np.testing.assert_array_equal(placed, np.arange(48).reshape(16, 3))
  assert placed.dtype == np.int32 and placed.sharding == by_rows(make_mesh())


@pytest.mark.parametrize(
  "layout",
  [
    pytest.param({}, id="default", marks=pytest.mark.slow),
    pytest.param(dict(fsdp=4, frozen="sharded", candidates="host"), id="all"),
  ],
)
def test_the_handed_over_state_has_the_shardings_of_the_next_phase(layout, tmp_path, monkeypatch):
  """Shapes, dtypes and shardings on eight devices, so that the step is not compiled again for this state."""
  monkeypatch.setattr(
    phases, "build_phase", build_phase.__wrapped__
  )  # the original; its `create` is the compiled function
  keys = {f"sharding__{key}": value for key, value in layout.items()}
  first, main = build_phases(resolved(tmp_path, warm_start_steps=2, **keys), make_mesh(fsdp=layout.get("fsdp", 1)))
  kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
  state = first.create()
  assert kind(state) == kind(first.abstract)
  assert kind(warm_start.hand_over(state, first, main)) == kind(main.abstract)
