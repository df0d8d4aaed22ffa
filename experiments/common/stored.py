"""The trials in results.json: enough to draw all outputs again, and to continue a sweep on another machine.

A cell of results.json holds the outcome of a trial, the data fingerprint and the resolved config of its run. Keys whose
values all cells share are in `config` at the top of the file. Keys that do not change what a run computes are left out,
and so are the paths of the data, which the fingerprint identifies.
"""

import json
import math
from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict

from experiments.common.search import Point
from switchlora_jax.data.folders import Dataset
from switchlora_jax.errors import UserError
from switchlora_jax.runs.directory import FREE, changed_texts, differences, flatten, with_added_keys
from switchlora_jax.runs.files import read_json_object, replace_text

PATHS = ("data.path", "data.eval_path", "data.mixture", "data.tokenizer")


def config_keys(config) -> dict[str, Any]:
  """{flattened key: JSON value} of a resolved config, without `FREE` and `PATHS`; infinity becomes a string."""
  keys = {key: value for key, value in flatten(config).items() if key not in {*FREE, *PATHS}}
  return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in keys.items()}


def with_shared_config(results: dict) -> dict:
  """The results with the keys that all cells share moved to `config` at the top; inverse of `read_cells`."""
  cells = [*results["cells"], *results.get("other_cells", ())]
  shared = set.intersection(*(set(cell["config"].items()) for cell in cells)) if cells else set()
  keys = {key for key, _ in shared}
  own = lambda cell: cell | {"config": {k: v for k, v in cell["config"].items() if k not in keys}}
  compact = {part: [own(cell) for cell in results[part]] for part in ("cells", "other_cells") if part in results}
  return results | {"config": dict(sorted(shared))} | compact


def read_results(workdir: Path) -> dict | None:
  """The contents of results.json, or None if there is no such file.

  Raises:
    UserError: the file is not the JSON that a sweep writes.
  """
  path = workdir / "results.json"
  if not path.exists():
    return None
  results = read_json_object(path)
  if not all(isinstance(results.get(part), list) for part in ("arms", "cells")):
    raise UserError(f"{path} must be written by a sweep, with the lists arms and cells; restore it, or move it away")
  return results


def read_cells(workdir: Path) -> dict[str, dict]:
  """{name: cell} of all trials in results.json that have a config, each with its whole config; empty if no file."""
  results = read_results(workdir) or {"cells": []}
  shared, cells = results.get("config", {}), [*results["cells"], *results.get("other_cells", ())]
  return {cell["name"]: cell | {"config": shared | cell["config"]} for cell in cells if "config" in cell}


def cell_point(cell: dict) -> Point:
  """The place of an entry of results.json in the sweep of its variant."""
  return cell["learning_rate"], cell.get("rest_learning_rate")


def point_key(point: Point) -> str:
  """`0.002`, or `0.002, 0.01`: the learning rate, and that of embedding, norms and head if it is swept."""
  return ", ".join(f"{rate:g}" for rate in point if rate is not None)


def mismatch(cell: dict, config, data: Dataset) -> str | None:
  """Why a cell is not the finished run of a resolved config on `data`, or None if it is.

  Args:
    cell: from `read_cells`.
  """
  then = with_added_keys(unflatten_dict(cell["config"], sep="."))  # the cell may be of an earlier version of the code
  if changed := differences(config_keys(then), config_keys(config)):
    return "; ".join(changed)
  if cell["data_fingerprint"] != data.fingerprint:
    return f"data fingerprint: {cell['data_fingerprint']} → {data.fingerprint}"
  for label, then, now in changed_texts(cell, data):
    return f"the text of data.eval_also={label} has changed: {then} → {now}"
  if cell["failure"]:
    return "it failed"
  if not cell["curve"] or cell["curve"][-1][0] != config.steps:
    return "it has no evaluation at its last step"
  return None


def write_results_json(results: dict, workdir: Path) -> None:
  """Write results.json atomically; finished trials of the previous file that are not among them are kept.

  These are the trials that a continued sweep has not reached again, and those of another sweep in the same directory.

  Args:
    results: from `results.collect`.
  """
  names = {cell["name"] for cell in results["cells"]}
  others = [cell for name, cell in read_cells(workdir).items() if name not in names and not cell["failure"]]
  whole = {cell["name"]: cell for cell in results["cells"]}
  shared = results["config"]
  expanded = [cell | {"config": shared | cell["config"]} for cell in whole.values()]
  merged = results | {"cells": expanded} | ({"other_cells": others} if others else {})
  replace_text(workdir / "results.json", json.dumps(with_shared_config(merged), indent=1) + "\n")
