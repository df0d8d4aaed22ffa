"""Collectives of a compiled program, parsed from its HLO text: kind, size, groups and number of executions."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVE_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

COLLECTIVE = re.compile(rf"= (?P<type>.*?) (?P<kind>{'|'.join(COLLECTIVE_KINDS)})(?P<start>-start)?\(")
COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) .*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


class Collective(NamedTuple):
  """One collective operation.

  Attributes:
    kind: one of `COLLECTIVE_KINDS`.
    size: bytes per device of its full array: the result, or the operand of a reduce-scatter.
    groups: ids of the devices in each group; for a collective-permute, the pairs (source, target).
    times: number of executions per run of the program.
    certain: false in a loop with unknown trip count, which `times` counts as 1 iteration.
  """

  kind: str
  size: int
  groups: tuple[tuple[int, ...], ...]
  times: int
  certain: bool

  @property
  def sent(self) -> float:
    """Bytes that each device sends per run of the program, in a ring over the n devices of its group.

    all-reduce: 2(n - 1)/n of its size; all-gather, reduce-scatter, all-to-all: (n - 1)/n; collective-permute: 1.
    """
    n = len(self.groups[0])
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
    return self.times * share * self.size


def collectives(program: str, devices: int) -> list[Collective]:
  """The collectives of a compiled program.

  A collective in a loop counts once per iteration, also in nested loops and in computations called from a loop. Both
  branches of a conditional count. Groups of a single device send nothing and are left out.

  Args:
    program: its HLO text, `compiled.as_text()`.
    devices: number of devices it was compiled for.
  """
  bodies, name = {}, None
  for line in program.splitlines():
    if head := COMPUTATION.match(line):
      name = "ENTRY" if head[1] else head[2]
      bodies[name] = []
    elif name:
      bodies[name].append(line)
  return [found for found in _walk(bodies, "ENTRY", 1, True, devices) if len(found.groups[0]) > 1]


def _walk(bodies, name: str, times: int, certain: bool, devices: int) -> Iterator[Collective]:
  for line in bodies[name]:
    if found := COLLECTIVE.search(line):
      groups = _groups(line, devices)
      size = sum(map(_bytes, _results(found)))
      if found["kind"] == "reduce-scatter":
        size *= len(groups[0])
      yield Collective(found["kind"], size, groups, times, certain)
    trips = TRIPS.search(line)
    loop = " while(" in line
    iterations = int(trips[1]) if loop and trips else 1
    branches = [branch.strip("% ") for group in BRANCHES.findall(line) for branch in group.split(",")]
    for called in CALLED.findall(line) + branches:
      yield from _walk(bodies, called, times * iterations, certain and bool(trips or not loop), devices)


def _results(found: re.Match) -> list[str]:
  """The types of the result arrays of a collective.

  The type of a -start operation is (operands, results, …); that of all-reduce-start is its results alone.
  """
  text = re.sub(r"/\*.*?\*/", "", found["type"])
  if found["start"] and found["kind"] != "all-reduce":
    text = _elements(text)[1]
  return [shape[0] for shape in ARRAY.finditer(text)]


def _elements(text: str) -> list[str]:
  """The elements of a tuple type: `(f32[2,3]{1,0}, (s32[], s32[]))` has two."""
  depth, elements = 0, [""]
  for character in text.strip()[1:-1]:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and depth == 0:
      elements.append("")
    else:
      elements[-1] += character
  return elements


def _bytes(shape: str) -> int:
  """Size in bytes of an array, from its type such as `bf16[24,2048]`."""
  kind, sides = ARRAY.match(shape).groups()
  bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or "0")[0])  # a token has no bits
  return math.ceil(bits * math.prod(map(int, filter(None, sides.split(",")))) / 8)


def _groups(line: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """The device groups: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, or all devices if there are none in the text."""
  if found := IOTA.search(line):
    groups, members, sides, order = (tuple(map(int, part.split(","))) if part else () for part in found.groups())
    numbers = np.arange(math.prod(sides)).reshape(sides).transpose(order or None)
    return tuple(map(tuple, numbers.reshape(*groups, *members).tolist()))
  if found := LISTED.search(line):
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1]))
  return (tuple(range(devices)),)
