"""What a compiled program sends between devices, read from its text: which operations, how large, how often."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

COLLECTIVE = re.compile(rf"= (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) .*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


class Collective(NamedTuple):
  """One operation between devices.

  Attributes:
    kind: one of `KINDS`.
    size: bytes, on each device, of the whole it works on: of the result, or of a reduce-scatter the operand.
    groups: the numbers of the devices that exchange with each other; of a permutation, the pairs (from, to).
    times: how often it runs in one run of the program.
    certain: false where it stands in a loop whose turns the compiler does not know; `times` takes them for one.
  """

  kind: str
  size: int
  groups: tuple[tuple[int, ...], ...]
  times: int
  certain: bool

  @property
  def sent(self) -> float:
    """Bytes that each device sends in one run of the program, all its turns, around a ring of the n of its group.

    all-reduce 2(n - 1)/n of its size; all-gather, reduce-scatter and all-to-all (n - 1)/n; a permutation all of it.
    """
    n = len(self.groups[0])
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
    return self.times * share * self.size


def collectives(program: str, devices: int) -> list[Collective]:
  """The collectives in the text of a compiled program for so many devices (`compiled.as_text()`).

  What stands in a loop counts once a turn, also in loops of loops and in computations called from there; of two
  branches both count. A device that is alone in its group sends nothing, and is left out.
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
    turns = int(trips[1]) if loop and trips else 1
    branches = [branch.strip("% ") for group in BRANCHES.findall(line) for branch in group.split(",")]
    for called in CALLED.findall(line) + branches:
      yield from _walk(bodies, called, times * turns, certain and bool(trips or not loop), devices)


def _results(found: re.Match) -> list[str]:
  """The types of the arrays that a collective results in.

  The type of a -start is (operands, results, …), but for all-reduce-start, whose operands are results.
  """
  text = re.sub(r"/\*.*?\*/", "", found["type"])
  if found["start"] and found["kind"] != "all-reduce":
    text = _elements(text)[1]
  return [shape[0] for shape in ARRAY.finditer(text)]


def _elements(text: str) -> list[str]:
  """The elements of the type of a tuple, `(f32[2,3]{1,0}, (s32[], s32[]))` has two."""
  depth, elements = 0, [""]
  for character in text.strip()[1:-1]:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and depth == 0:
      elements.append("")
    else:
      elements[-1] += character
  return elements


def _bytes(shape: str) -> int:
  """Bytes of one array, from its type such as `bf16[24,2048]`."""
  kind, sides = ARRAY.match(shape).groups()
  bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or "0")[0])  # a token has none
  return math.ceil(bits * math.prod(map(int, filter(None, sides.split(",")))) / 8)


def _groups(line: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """Which devices exchange: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, or nothing, which is all of them."""
  if found := IOTA.search(line):
    groups, members, sides, order = (tuple(map(int, part.split(","))) if part else () for part in found.groups())
    numbers = np.arange(math.prod(sides)).reshape(sides).transpose(order or None)
    return tuple(map(tuple, numbers.reshape(*groups, *members).tolist()))
  if found := LISTED.search(line):
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1]))
  return (tuple(range(devices)),)
