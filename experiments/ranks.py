"""Plot the singular values of the weights of runs, and print the ranks of W − W₀, per kind of layer (Figures 10, 11).

python -m experiments.ranks --run=runs/full --run=runs/lora --run=runs/switchlora --out=runs/ranks
"""

from pathlib import Path

from absl import flags

from experiments.common import cli, spectra
from switchlora_jax.errors import UserError
from switchlora_jax.runs.directory import open_run

RUN = flags.DEFINE_multi_string("run", [], "directory of a run (its --workdir); repeatable")
OUT = flags.DEFINE_string("out", "runs/ranks", "directory for ranks.json, weights.png and learnt.png; created")
cli.define_quiet()


def main():
  """Check the flags, measure each run, write figures and ranks.json."""
  directories = [Path(run).expanduser() for run in RUN.value]
  if not directories:
    raise UserError(
      "--run is missing: give the directory of a trained run, for example --run=runs/tiny; it is repeatable"
    )
  runs = [open_run(directory) for directory in directories]
  names = [directory.name for directory in directories]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f"--run is given twice with the name {', '.join(twice)}; directory names must be unique")
  spectra.conclude(runs, Path(OUT.value).expanduser(), flags.FLAGS.quiet)


if __name__ == "__main__":
  cli.run(main)
