"""Export a run as a Hugging Face folder with the adapters merged into the weights.

python -m experiments.export --run=runs/tiny --out=exports/tiny
python -m experiments.export --run=runs/tiny --out=exports/tiny --dtype=bfloat16

Exports the newest checkpoint, also of a run that is still training, and compares the logits of the export with those
of the run before it is complete. The folder can be loaded with `transformers` and with
`--config.warm_start_from=exports/tiny`. Adapters cannot be exported alone: they belong to the base weights of the same
checkpoint, which SwitchLoRA changes at every switch.
"""

from pathlib import Path

from absl import flags

from experiments.common import cli
from switchlora_jax.errors import UserError
from switchlora_jax.interop import export

RUN = flags.DEFINE_string("run", None, "directory of a run: its --workdir")
DTYPE = flags.DEFINE_enum("dtype", "float32", export.DTYPES, "dtype of the written tensors")
OUT = flags.DEFINE_string("out", None, "folder to write; must be new, empty or an earlier export")


def export_report(done: export.Exported) -> str:
  """The origin of an export, its largest deviation from the run, and the norm of the adapters per kind of layer."""
  lines = [f"exported: {done.origin}", f"largest difference of logits from the run's own model: {done.difference:.1e}"]
  if done.rounding is not None:
    lines[1] = f"largest difference of logits from the merged weights in bfloat16: {done.difference:.1e}"
    lines.append(f"largest difference of logits by rounding to bfloat16: {done.rounding:.1e}")
  if done.adapters:
    lines.append("the merged weights differ from the base weights; norm of B·A relative to that of the base:")
    lines += [f"  {kind:<5} {ratio:.3f}" for kind, ratio in done.adapters.items()]
  else:
    lines.append("the run has no adapters on base weights to compare")
  return "\n".join([*lines, *done.remarks])


def main():
  """Check the flags, export, print the report."""
  for flag in (RUN, OUT):
    if flag.value is None:
      raise UserError(f"--{flag.name} is missing: python -m experiments.export --run=runs/tiny --out=exports/tiny")
  out = Path(OUT.value).expanduser()
  print(export_report(export.export(Path(RUN.value).expanduser(), out, DTYPE.value)))
  print(f"saved in: {out} ({', '.join(sorted(path.name for path in out.iterdir()))})")


if __name__ == "__main__":
  cli.run(main)
