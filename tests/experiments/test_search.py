"""The rule that extends a sweep of learning rates, on loss surfaces in closed form."""

import math

import pytest

from experiments.common import search


def explore(surface, given, limit=4, rate=None) -> dict:
  """{point: loss} of a sweep: the given points, then those of `next_point` one by one; `rate` is one that is fixed."""
  losses = {(x, y): surface(x, y) for x in given[0] or (rate,) for y in given[1] or (None,)}
  while point := search.next_point(losses, given, limit):
    assert point not in losses
    losses[point] = surface(*point)
  return losses


def bowl(best_rate, best_rest, coupling=0.0):
  """A loss with its minimum at the two rates, quadratic in their logarithms; `coupling` tilts its axes."""

  def surface(rate, rest):
    x, y = math.log2(rate / best_rate), 0.0 if rest is None else math.log2(rest / best_rest)
    return 3 + x * x + y * y + coupling * x * y

  return surface


def has_better_neighbour(losses, point) -> bool:
  grid = [search.neighbours(point, losses, dimension) for dimension in (0, 1)]
  return any(losses[neighbour] <= losses[point] for pair in grid for neighbour in pair)


@pytest.mark.parametrize("coupling", [0.0, 0.5, -0.5])
@pytest.mark.parametrize("given", [((1e-3, 2e-3), (1e-3, 2e-3)), ((1e-3,), (4e-3,)), ((2.5e-4, 5e-4), (0.032,))])
def test_the_search_finds_an_optimum_far_outside_the_grid(given, coupling):
  surface = bowl(1e-3 * 2**3, 1e-3 * 2**-3, coupling)
  losses = explore(surface, given, limit=20)
  best = search.best_point(losses)
  assert best == pytest.approx((8e-3, 1.25e-4)) and search.edges(losses) == (False, False)
  assert not has_better_neighbour(losses, best)
  assert len(losses) < (20 if coupling == 0 else 30), "a cross around a path, not the product"


def test_a_best_point_inside_the_given_ones_needs_no_further_run():
  given = ((5e-4, 1e-3, 2e-3), (1e-3, 2e-3, 4e-3))
  assert len(explore(bowl(1e-3, 2e-3), given)) == 9


def test_one_dimension_is_extended_by_the_ratio_of_its_outermost_rates():
  losses = explore(bowl(0.3, None), ((1e-3, 2e-3, 1e-2), ()))
  assert [rate for rate, _ in losses] == pytest.approx([1e-3, 2e-3, 1e-2, 5e-2, 0.25, 1.25])
  assert search.best_point(losses) == (0.25, None) and search.edges(losses) == (False, False)


def test_a_dimension_without_given_rates_is_fixed():
  losses = explore(bowl(1.0, 8e-3), ((), (1e-3,)), rate=1e-3)
  assert {rate for rate, _ in losses} == {1e-3} and search.best_point(losses) == (1e-3, 8e-3)
  assert search.edges(losses) == (False, False), "a dimension with one value has no edge"


def test_the_limit_of_each_side_leaves_the_best_point_at_the_edge():
  losses = explore(bowl(1.0, 1e-3), ((1e-3, 2e-3), (5e-4, 1e-3, 2e-3)), limit=3)
  assert max(rate for rate, _ in losses) == pytest.approx(2e-3 * 2**3)
  assert search.best_point(losses) == pytest.approx((1.6e-2, 1e-3)) and search.edges(losses) == (True, False)


def test_a_diverged_neighbour_is_worse():
  surface = lambda rate, rest: math.inf if rate > 3e-3 else -math.log(rate)
  losses = explore(surface, ((1e-3, 2e-3), ()))
  assert search.best_point(losses) == (2e-3, None) and math.isinf(losses[4e-3, None])
  assert search.edges(losses) == (False, False) and len(losses) == 3


def test_where_all_runs_diverged_smaller_rates_are_tried_up_to_the_limit():
  surface = lambda rate, rest: math.inf if rate > 3e-4 else 3.0 - 100 * rate
  losses = explore(surface, ((1e-3, 2e-3), ()))
  assert search.best_point(losses) == (2.5e-4, None) and search.edges(losses) == (False, False)
  never = explore(lambda rate, rest: math.inf, ((1e-3, 2e-3), (1e-3,)), limit=2)
  assert search.best_point(never) is None and search.edges(never) == (False, False)
  assert min(never) == (2.5e-4, 2.5e-4) and len(never) == 6 and max(never) == (2e-3, 1e-3)


def test_without_extension_the_outermost_points_are_edges():
  losses = {(rate, rest): bowl(2e-3, 2e-3)(rate, rest) for rate in (1e-3, 2e-3) for rest in (1e-3, 2e-3, 4e-3)}
  assert search.edges(losses) == (True, False)
  del losses[2e-3, 4e-3]
  assert search.edges(losses) == (True, True), "a neighbour that has not run"
  assert search.edges({(1e-3, None): 3.0}) == search.edges({}) == (False, False)


def test_equal_losses_end_the_search():
  losses = explore(lambda rate, rest: 3.0, ((1e-3, 2e-3), (1e-3,)))
  assert search.best_point(losses) == (1e-3, 1e-3) and len(losses) == 5
