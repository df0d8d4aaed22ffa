"""Periodic work of the methods: decompositions and restarts, which take place at an interval of many steps.

A program with an interval of one step does this work in every step, so that its time can be measured.
"""

# {method: config key of the interval}
INTERVALS = {
  "relora": "relora.restart_every",
  "galore": "galore.refresh_every",
  "fira": "fira.refresh_every",
  "frugal": "frugal.refresh_every",
  "factored": "factored.restart_every",
}


def program(method: str) -> str:
  """The name of the program that does a method's periodic work in every step."""
  return f"{method} refreshing"


PROGRAMS = {program(method): method for method in INTERVALS}


def keys(method: str) -> dict[str, int]:
  """The config keys of that program; ReLoRA's warm-ups must be shorter than its interval."""
  shorter = {"relora.restart_warmup_steps": 0, "warmup_steps": 0} if method == "relora" else {}
  return {INTERVALS[method]: 1} | shorter
