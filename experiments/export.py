"""Write a run as a Hugging Face LLaMA folder: adapters merged into the weights, float32, compared before it is done.

python -m experiments.export --run=runs/tiny --out=exports/tiny

The newest checkpoint is taken, of a run that is still training, too. `transformers` loads the folder, and so does
`--config.warm_start_from=exports/tiny`. Adapters alone are never written: what they belong to is the base of this very
checkpoint, into which SwitchLoRA moves vectors at every step.
"""

from pathlib import Path

from absl import flags

from experiments.common import cli
from switchlora_jax.errors import UserError
from switchlora_jax.interop import export

RUN = flags.DEFINE_string("run", None, "directory of a run: its --workdir")
OUT = flags.DEFINE_string("out", None, "folder to write; it must be new, empty or an earlier export")


def describe(done: export.Exported) -> str:
  """What was exported, how far from the run it is, and from the bare base."""
  lines = [f"exported: {done.origin}", f"largest difference of logits from the run's own model: {done.difference:.1e}"]
  if done.adapters:
    lines.append("merged is not the base: norm of the adapters' product, relative to the base's")
    lines += [f"  {kind:<5} {ratio:.3f}" for kind, ratio in done.adapters.items()]
  else:
    lines.append("there are no adapters: merged is the base")
  return "\n".join([*lines, *done.remarks])


def main():
  """Check, export, say what there is."""
  for flag in (RUN, OUT):
    if flag.value is None:
      raise UserError(f"--{flag.name} is missing: python -m experiments.export --run=runs/tiny --out=exports/tiny")
  out = Path(OUT.value).expanduser()
  print(describe(export.export(Path(RUN.value).expanduser(), out)))
  print(f"saved in: {out} ({', '.join(sorted(path.name for path in out.iterdir()))})")


if __name__ == "__main__":
  cli.run(main)
