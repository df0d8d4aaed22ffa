"""The points of a sweep of learning rates, and the rule by which it is extended until its best point is inside.

A point is the pair (learning rate, learning rate of embedding, norms and head). The second number is None if it is not
swept. The neighbours of a point are the next smaller and the next larger value in each dimension. Beyond the last value
of a dimension, the next one continues with the ratio of the two outermost values. A best point is inside if all its
neighbours have run; none of them is then better. Else it is at an edge. The diagonal neighbours are not required: if
the two rates interact strongly, one of them may be better.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

Point = tuple[float, float | None]
FACTOR = 2.0  # ratio of neighbours in a dimension with a single value


def best_point(losses: Mapping[Point, float]) -> Point | None:
  """The point with the lowest loss, the first of equal ones; None if no loss is finite."""
  finite = {point: loss for point, loss in losses.items() if math.isfinite(loss)}
  return min(finite, key=finite.__getitem__) if finite else None


def next_value(values: Collection[float], value: float, up: bool) -> float:
  """The next larger (`up`) or smaller value, or the continuation of the values beyond the last one.

  Args:
    values: all values of the dimension, including `value`.
  """
  ordered = sorted(values, reverse=not up)
  if further := [other for other in ordered if (other > value if up else other < value)]:
    return further[0]
  ratio = ordered[-1] / ordered[-2] if len(ordered) > 1 else FACTOR if up else 1 / FACTOR
  return float(f"{value * ratio:.6g}")  # as in the names of trials, which must differ


def neighbours(point: Point, points: Collection[Point], dimension: int) -> Iterator[Point]:
  """The neighbours above and below `point`, one of `points`, in one dimension: 0 or 1."""
  values = {other[dimension] for other in points}
  for up in (True, False):
    changed = list(point)
    changed[dimension] = next_value(values, point[dimension], up)
    yield tuple(changed)


def edges(losses: Mapping[Point, float]) -> tuple[bool, bool]:
  """Whether the best point has neighbours that have not run, per dimension; a dimension with one value has no edge.

  Args:
    losses: {point: loss} of all runs, infinite for those that diverged, without those that failed.
  """
  best = best_point(losses)
  if best is None:
    return False, False
  open_in = lambda dimension: any(point not in losses for point in neighbours(best, losses, dimension))
  first, second = (len({point[d] for point in losses}) > 1 and open_in(d) for d in (0, 1))
  return first, second


def next_point(losses: Mapping[Point, float], given: Sequence[Sequence[float]], limit: int) -> Point | None:
  """The point to run next: a neighbour of the best point that has not run; None if there is none.

  A neighbour comes first if the one on the other side has run, so that the search follows a line to its end before it
  changes the direction. If every run diverged, the sweep is extended towards smaller rates.

  Args:
    losses: {point: loss} of all runs, infinite for those that diverged or failed.
    given: the values of each dimension that the sweep started with; a dimension without values is not extended.
    limit: largest number of values in a dimension below the given ones, and above them.
  """
  best, candidates = best_point(losses), []
  start = best or min(losses, key=lambda point: (point[0], point[1] or 0.0))
  for dimension in (d for d in (0, 1) if given[d]):
    above, below = neighbours(start, losses, dimension)
    for point, other_side in ((above, below), (below, above)) if best else ((below, above),):
      if point not in losses and within_limit(point, losses, dimension, given, limit):
        candidates.append((other_side not in losses, point))
  return min(candidates, key=lambda candidate: candidate[0])[1] if candidates else None


def within_limit(
  point: Point, points: Collection[Point], dimension: int, given: Sequence[Sequence[float]], limit: int
) -> bool:
  """Whether a sweep that also has this point exceeds the given values by at most `limit` values per side."""
  values = {other[dimension] for other in (*points, point)}
  above, below = (sum(v > max(given[dimension]) for v in values), sum(v < min(given[dimension]) for v in values))
  return max(above, below) <= limit
