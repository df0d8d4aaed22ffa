"""Measure a trained run: loss, perplexity and bits per byte, on the rows that it validates on or on other text.

python -m experiments.evaluate --run=runs/tiny
python -m experiments.evaluate --run=runs/tiny --checkpoint=500 --data='c4/*.json.gz' --json=c4.json
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from configs.base import get_config
from experiments.common import cli
from switchlora_jax.data import corpus, dataset, preparation
from switchlora_jax.data import shards as packed
from switchlora_jax.errors import UserError
from switchlora_jax.interop import saved_run
from switchlora_jax.interop.saved_run import SavedRun
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs.directory import flatten
from switchlora_jax.runs.files import replace_text
from switchlora_jax.training.evaluation import first, validate

RUN = flags.DEFINE_string("run", None, "directory of a run: its --workdir")
CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "step of a checkpoint; the newest that is not damaged by default")
DATA = flags.DEFINE_string(
  "data",
  None,
  "a glob of plain text, JSON lines or Parquet, or a folder that experiments.prepare_data filled, of which the "
  "validation rows are taken; by default the validation rows of the run",
)
TOKENS = flags.DEFINE_integer(
  "tokens", None, "at most, but one row at least; by default the run's eval_tokens", lower_bound=1
)
JSON = flags.DEFINE_string("json", None, "write the numbers to this file as well")


class Text(NamedTuple):
  """What is evaluated: rows [n, seq_len], and what they are."""

  name: str
  rows: packed.PackedSequences
  bytes_per_token: float
  fingerprint: str


def check() -> SavedRun:
  """The run that the flags name, where it can be evaluated."""
  if RUN.value is None:
    raise UserError("--run is missing: give the directory of a trained run, say --run=runs/tiny")
  cli.check_json(JSON.value)
  run = saved_run.open_run(Path(RUN.value).expanduser())
  if missing := sorted(flatten(get_config()).keys() - flatten(run.config).keys()):
    raise UserError(
      f"the run in {run.directory} was made by other code: its config has no {', '.join(missing)}; "
      f"evaluate it with the code of then (git revision {run.revision})"
    )
  if CHECKPOINT.value is not None:
    run.check_step(CHECKPOINT.value, "--checkpoint")
  return run


def text_of(run: SavedRun) -> Text:
  """The rows that the flags name, made now if need be."""
  if DATA.value is None:
    text = own(run)
  elif (folder := Path(DATA.value).expanduser()).is_dir():
    text = prepared(run, folder)
  else:
    text = tokenized(run, DATA.value)
  return text._replace(rows=first(text.rows, TOKENS.value or run.config.eval_tokens))


def own(run: SavedRun) -> Text:
  """The validation rows of the run."""
  try:
    data = dataset.open_dataset(run.config)
  except UserError as error:
    raise UserError(f"the run's own validation rows: {error}; or evaluate other text with --data") from error
  if data.fingerprint != run.fingerprint:
    raise UserError(
      f"the data are not those that the run in {run.directory} was trained on (fingerprint {data.fingerprint}, then "
      f"{run.fingerprint}); restore the files, packages and code of then, or evaluate other text with --data"
    )
  return Text("the run's own validation rows", data.valid, data.bytes_per_token, data.fingerprint)


def prepared(run: SavedRun, folder: Path) -> Text:
  """The validation rows of a prepared folder: those on which a run on it validates."""
  manifest = packed.read_manifest(folder)
  if manifest is None:
    raise UserError(
      f"--data (={DATA.value!r}) must be a glob of files or a folder that experiments.prepare_data has filled; this "
      f"folder has no {packed.MANIFEST}; name its files, as in --data='{folder}/*', or prepare it to the end"
    )
  if manifest["tokenizer"] != packed.checksum(run.tokenizer):
    raise UserError(
      f"--data (={DATA.value!r}) must be prepared with the tokenizer of the run; it has another; "
      f"prepare the text with --tokenizer={run.tokenizer}, or name its files"
    )
  if (found := manifest["request"]["seq_len"]) != run.config.seq_len:
    raise UserError(
      f"--data (={DATA.value!r}) must have rows of {run.config.seq_len} tokens, as the run; it has rows of {found}; "
      f"prepare the text with --seq_len={run.config.seq_len}, or name its files"
    )
  packed.verify_checksums(folder, manifest, progress=True)
  data = dataset.open_folder(folder, manifest, "prepared")
  return Text(f"validation rows of {folder}", data.valid, data.bytes_per_token, data.fingerprint)


def tokenized(run: SavedRun, pattern: str) -> Text:
  """All the text of some files, packed into the run's cache with its tokenizer."""
  files = tuple(map(corpus.LocalFile, corpus.matching_files(pattern, "--data")))
  request = preparation.Request([file.origin() for file in files], str(run.tokenizer), run.config.seq_len)
  read = lambda: corpus.Corpus(files, None)
  folder = dataset.cached_folder(run.config.data.cache_dir, "evaluate", request, read, progress=True)
  manifest = packed.read_manifest(folder)
  packed.verify_checksums(folder, manifest, progress=True)
  found = manifest["train"]
  rows = packed.open_sequences(folder, found)
  return Text(pattern, rows, found["bytes"] / max(1, found["tokens"]), packed.fingerprint(manifest))


def measure(run: SavedRun, text: Text) -> dict:
  """Everything that is said of a checkpoint and a text, as plain values."""
  config, devices = run.config, jax.device_count()
  mesh = make_mesh(fsdp=math.gcd(config.sharding.fsdp, devices))
  phase, state = saved_run.restore(run, CHECKPOINT.value, mesh)
  # Each device takes as many rows at once as in training: the numbers are the same, to the bit, on any number of them.
  share = max(1, config.batch_size // (config.accumulation * run.devices))
  with jax.set_mesh(mesh):
    numbers = validate(phase, state, text.rows, share * devices, text.bytes_per_token)
  rows, seq_len = text.rows.shape
  sizes = {"rows": rows, "tokens": rows * seq_len, "bytes": round(rows * seq_len * text.bytes_per_token)}
  names = {"run": str(run.directory), "method": config.method, "step": int(state.step)}
  return names | {"data": text.name, "fingerprint": text.fingerprint} | sizes | numbers


def table(found: dict) -> str:
  """The same to be read."""

  def shown(key: str, digits: int) -> str:
    error = found[f"{key}_se"]
    return f"{found[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")

  return "\n".join(
    [
      f"run: {found['run']}, {found['method']}, step {found['step']:,}",
      f"data: {found['data']}, fingerprint {found['fingerprint']}",
      f"  {found['rows']:,} rows, {found['tokens']:,} tokens, about {found['bytes']:,} bytes of text",
      f"loss: {shown('val_loss', 4)} nats per token",
      f"perplexity: {shown('val_ppl', 2)}",
      f"bits per byte: {shown('val_bpb', 4)}",
      "± is one standard error over rows, as if these were independent",
    ]
  )


def main():
  """Check, read, measure, print, write."""
  run = check()
  cli.set_precision(run.config)
  found = measure(run, text_of(run))
  print(table(found))
  if JSON.value:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}
    replace_text(Path(JSON.value), json.dumps(finite, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main)
