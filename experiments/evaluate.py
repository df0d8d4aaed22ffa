"""Evaluate a trained run: loss, perplexity and bits per byte on its validation sequences or on other text.

python -m experiments.evaluate --run=runs/tiny
python -m experiments.evaluate --run=runs/tiny --checkpoint=500 --data='c4/*.json.gz' --json=c4.json

Prints each number with its standard error. The results are bitwise those that the run logged, on any number of devices.
"""

import json
import math
from pathlib import Path

import jax
from absl import flags
from ml_collections import FrozenConfigDict

from configs.base import get_config
from experiments.common import cli
from switchlora_jax.data import dataset, texts
from switchlora_jax.data.folders import PackedText
from switchlora_jax.data.readers import BAD_ROWS, RowOptions
from switchlora_jax.data.tokenizer import copy_in_run
from switchlora_jax.errors import UserError
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs.directory import SavedRun, flatten, open_run
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training.evaluation import first, token_count, validate
from switchlora_jax.training.phases import restore_phase

RUN = flags.DEFINE_string("run", None, "directory of a run: its --workdir")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of a checkpoint; default: the newest undamaged one")
DATA = flags.DEFINE_string(
  "data",
  None,
  "glob of plain text, JSON lines or Parquet files; or a folder written by experiments.prepare_data, hub:NAME or docs "
  "(documentation of the packages), whose validation sequences are used; default: the run's own validation sequences",
)
TOKENS = flags.DEFINE_integer(
  "tokens", None, "maximum number of tokens, at least one sequence; default: the run's eval_tokens", lower_bound=1
)
FIELD_NAME = flags.DEFINE_string("field", None, "JSON key or Parquet column of the text; default: the run's data.field")
ROWS_WITHOUT_TEXT = flags.DEFINE_enum(
  "bad_rows", None, BAD_ROWS, "what to do with rows without text, see --config.data.bad_rows; default: as the run"
)
JSON = flags.DEFINE_string("json", None, "also write the results to this file")
cli.define_quiet()


def open_flagged_run() -> SavedRun:
  """The run that --run names, after all flags are checked."""
  if RUN.value is None:
    raise UserError("--run is missing: give the directory of a trained run, for example --run=runs/tiny")
  cli.check_json(JSON.value)
  run = open_run(Path(RUN.value).expanduser())
  if missing := sorted(flatten(get_config()).keys() - flatten(run.config).keys()):
    raise UserError(
      f"the run in {run.directory} was made by another version of the code: its config has no {', '.join(missing)}; "
      f"evaluate it with that version (git revision {run.revision})"
    )
  if CHECKPOINT.value is not None:
    run.check_step(CHECKPOINT.value, "--checkpoint")
  return run


def select_text(run: SavedRun) -> PackedText:
  """The sequences that the flags select, tokenized first if necessary."""
  data = run.config.data
  if DATA.value is None:
    text = own_validation_text(run)
  else:
    rows = RowOptions(FIELD_NAME.value or data.field, ROWS_WITHOUT_TEXT.value or data.bad_rows, flags="--")
    form = texts.Form(run.tokenizer, run.config.seq_len, data.packing, data.cache_dir, rows)
    named = texts.Named(DATA.value, "--data", DATA.value)
    text = texts.open_text(named, "valid", form, progress=not flags.FLAGS.quiet)
    if named.folder:
      text = text._replace(label=f"validation rows of {named.folder}")
  return text._replace(rows=first(text.rows, TOKENS.value or run.config.eval_tokens, data.packing == "pad"))


def own_validation_text(run: SavedRun) -> PackedText:
  """The validation sequences of the run itself."""
  try:
    own = run.config.to_dict()
    own["data"]["tokenizer"] = copy_in_run(own["data"]["tokenizer"], run.directory)
    data = dataset.open_dataset(FrozenConfigDict(own), progress=not flags.FLAGS.quiet, also=False)
  except UserError as error:
    raise UserError(f"the run's own validation rows: {error}; or evaluate other text with --data") from error
  if data.fingerprint != run.fingerprint:
    raise UserError(
      f"the data changed since the run in {run.directory} (fingerprint {data.fingerprint}, was {run.fingerprint}); "
      "restore its files, packages and code, or evaluate other text with --data"
    )
  return PackedText("the run's own validation rows", data.valid, data.bytes_per_token, data.fingerprint)


def evaluate_text(run: SavedRun, text: PackedText) -> dict:
  """Evaluate a checkpoint on a text; returns all results as plain JSON values."""
  config, devices = run.config, jax.device_count()
  mesh = make_mesh(fsdp=math.gcd(config.sharding.fsdp, devices))
  phase, state = restore_phase(run, CHECKPOINT.value, mesh)
  # The number of sequences per device is that of training: results are bitwise equal on any number of devices.
  share = max(1, config.batch_size // (config.accumulation * run.devices))
  with jax.set_mesh(mesh):
    numbers = validate(phase, state, text.rows, share * devices, text.bytes_per_token, flags.FLAGS.quiet)
  rows, seq_len = text.rows.shape
  tokens = token_count(text.rows) if config.data.packing == "pad" else rows * seq_len
  sizes = {"rows": rows, "tokens": tokens, "bytes": round(tokens * text.bytes_per_token)}
  names = {"run": str(run.directory), "method": config.method, "step": int(state.step)}
  origin = {"data": text.label, "fingerprint": text.fingerprint, "bad_rows": text.bad_rows}
  return names | origin | sizes | numbers


def evaluation_report(found: dict) -> str:
  """The results of `evaluate_text` as lines of text."""

  def with_error(key: str, digits: int) -> str:
    error = found[f"{key}_se"]
    return f"{found[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")

  return "\n".join(
    [
      f"run: {found['run']}, {found['method']}, step {found['step']:,}",
      f"data: {found['data']}, fingerprint {found['fingerprint']}",
      f"  {found['rows']:,} rows, {found['tokens']:,} tokens, about {found['bytes']:,} bytes of text",
      *([f"  {found['bad_rows']:,} rows without text were left out"] if found["bad_rows"] else []),
      f"loss: {with_error('val_loss', 4)} nats per token",
      f"perplexity: {with_error('val_ppl', 2)}",
      f"bits per byte: {with_error('val_bpb', 4)}",
      "± is one standard error over rows, assuming independent rows",
    ]
  )


def main():
  """Check the flags, read the text, evaluate, print, write."""
  run = open_flagged_run()
  cli.set_precision(run.config)
  found = evaluate_text(run, select_text(run))
  print(evaluation_report(found))
  if JSON.value:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}
    replace_text(Path(JSON.value), json.dumps(finite, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main)
