"""Measure how far the merged weight of one layer drifts over thousands of switches, per storage format of the kernel.

python -m experiments.drift --workdir=runs/drift       # two settings: 2 minutes on a CPU with 2 cores
"""

import json
from pathlib import Path

from absl import flags
from matplotlib import pyplot as plt

from experiments.common import cli
from experiments.common.figures import line_style, save_figure
from switchlora_jax.analysis.drift import Setting, drifts
from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.switching import SwitchSchedule

SWITCHES = flags.DEFINE_integer("switches", 4000, "steps with one switch each; a run has 10 times as many steps")
SIZE = flags.DEFINE_integer("size", 256, "inputs and outputs of the layer", lower_bound=8, upper_bound=2**14)
RANK = flags.DEFINE_integer("rank", 32, "rank of the adapter", lower_bound=2)
WORKDIR = flags.DEFINE_string("workdir", None, "directory for drift.json and drift.png; created")
POINTS = 8


def settings() -> dict[str, Setting]:
  """{title: setting}: one switch per step, and the paper's schedule with its falling rate."""
  size, rank, steps = SIZE.value, RANK.value, SWITCHES.value
  layer = f"{size} × {size}, rank {rank}"
  one = SwitchSchedule(rank, freeze_steps=0, total_steps=steps, decay_to=1.0)
  run = SwitchSchedule(10, freeze_steps=0, total_steps=10 * steps)
  first = f"the first {4 * steps:,} of {10 * steps:,} steps at interval 10"
  return {
    f"{layer}: one vector per factor in each of {steps:,} steps": Setting(size, rank, one, steps),
    f"{layer}: {first}": Setting(size, rank, run, 4 * steps),  # 99% of the switches of a run
  }


def table(found: dict) -> str:
  """The results of a setting as a table, one column per storage format; drift in per cent."""
  names = [name for name in found if name != "switched"]
  head = ["vectors switched", *names]
  columns = zip(found["switched"], *(found[name] for name in names), strict=True)
  lines = [head, *([f"{vectors:,}", *(f"{100 * drift:.3f}%" for drift in rest)] for vectors, *rest in columns)]
  return "\n".join("  ".join(cell.rjust(len(name)) for cell, name in zip(line, head, strict=True)) for line in lines)


def plot(results: dict, path: Path):
  """Plot drift against the number of switched vectors, one panel per setting."""
  figure, panels = plt.subplots(1, len(results), figsize=(6.5 * len(results), 5), sharey=True, squeeze=False)
  for axes, (title, found) in zip(panels[0], results.items(), strict=True):
    for number, name in enumerate(name for name in found if name != "switched"):
      axes.semilogy(found["switched"], found[name], **line_style(number), markersize=4, label=name)
    axes.set_title(title.replace(": ", ":\n"), fontsize=10)
    axes.set_xlim(left=0)
    axes.set(xlabel="vectors switched per factor", ylabel="drift ‖W − W₃₂‖ / ‖W₃₂‖ (relative)")
    axes.grid(alpha=0.3, which="both")
  panels[0, 0].legend()
  figure.tight_layout()
  save_figure(figure, path)


def main():
  """Check the flags, simulate, print the tables, write drift.json and the plot."""
  if WORKDIR.value is None:
    raise UserError(
      "--workdir is missing: give the directory for drift.json and drift.png, for example --workdir=runs/drift"
    )
  if SWITCHES.value < POINTS or SIZE.value <= RANK.value:
    raise UserError(
      f"--switches (={SWITCHES.value}) must be at least {POINTS}, and --size (={SIZE.value}) more than --rank "
      f"(={RANK.value}), or there is nothing to switch"
    )
  workdir, results = Path(WORKDIR.value).expanduser(), {}
  cli.make_folder(workdir)
  for title, setting in settings().items():
    results[title] = drifts(setting, POINTS)
    print(f"{title}; drift from the float32 kernel:\n{table(results[title])}\n", flush=True)
  (workdir / "drift.json").write_text(json.dumps(results, indent=2) + "\n")
  plot(results, workdir / "drift.png")
  print(f"saved in: {workdir} (drift.json, drift.png, drift.svg)")


if __name__ == "__main__":
  cli.run(main)
