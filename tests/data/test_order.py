import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchlora_jax.data.order import shuffled

ROWS = st.integers(1, 3000)
SEEDS = st.integers(0, 2**32)


@settings(deadline=None)
@given(rows=ROWS, seed=SEEDS, epoch=st.integers(0, 1000))
def test_an_epoch_takes_every_row_once(rows, seed, epoch):
  picks = shuffled(np.arange(rows), rows, seed=seed, epoch=epoch)
  np.testing.assert_array_equal(np.sort(picks), np.arange(rows))


@settings(deadline=None)
@given(rows=ROWS, data=st.data())
def test_any_places_may_be_asked_for_alone(rows, data):
  whole = shuffled(np.arange(rows), rows, seed=1, epoch=2)
  places = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=8))
  np.testing.assert_array_equal(shuffled(np.array(places), rows, seed=1, epoch=2), whole[places])
  assert shuffled(places[0], rows, seed=1, epoch=2) == whole[places[0]]


def test_seeds_and_epochs_have_orders_of_their_own():
  orders = {(s, e): tuple(shuffled(np.arange(100), 100, seed=s, epoch=e)) for s in range(20) for e in range(20)}
  assert len(set(orders.values())) == 400 and tuple(range(100)) not in orders.values()


@pytest.mark.parametrize("rows", [2, 3, 7, 10, 17])
def test_every_row_is_as_likely_at_every_place(rows):
  """Pearson's χ² of the (place, row) counts; its mean is the degrees of freedom, its variance twice that."""
  draws = 4000
  picks = np.stack([shuffled(np.arange(rows), rows, seed=seed, epoch=0) for seed in range(draws)])
  counts = np.stack([np.bincount(picks[:, place], minlength=rows) for place in range(rows)])
  chi2, freedom = ((counts - draws / rows) ** 2 / (draws / rows)).sum(), (rows - 1) ** 2
  assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom) + 5


def test_neighbours_are_not_neighbours():
  """The distance of rows taken one after the other is that of independent draws: a third of all rows."""
  rows = 100_000
  picks = shuffled(np.arange(rows), rows, seed=0, epoch=0)
  assert abs(np.abs(np.diff(picks)).mean() / rows - 1 / 3) < 0.005
  assert abs(np.corrcoef(np.arange(rows), picks)[0, 1]) < 0.015  # five standard deviations


def test_more_rows_than_memory():
  rows = 10**15
  picks = shuffled(np.arange(0, rows, rows // 1000), rows, seed=0, epoch=0)
  assert len(set(picks)) == len(picks) and picks.min() >= 0 and picks.max() < rows and picks.max() > 0.9 * rows
