"""Tokenize and pack a corpus once, into a folder that training maps into memory.

python -m experiments.prepare_data --source=c4 --tokenizer=t5.model --seq_len=512 --take=48000000 --out=data/c4_512
python -m experiments.prepare_data --path='books/**/*.txt' --tokenizer=train:32000 --seq_len=256 --out=data/books

--packing=pad makes each document one row of at most --seq_len tokens, as in the experiments of GaLore.

Then train with --config.data.source=prepared --config.data.path=data/c4_512. The same command continues where it was
stopped; no document is lost or repeated.
"""

import shlex
from pathlib import Path

from absl import flags

from configs import llama_tiny
from experiments.common import cli
from switchlora_jax.data import corpus, folders, preparation, shards, tokenizer
from switchlora_jax.data.readers import BAD_ROWS, FIELD, RowOptions
from switchlora_jax.errors import UserError
from switchlora_jax.runs.tokenizer_files import tokenizer_in
from switchlora_jax.training import report

SOURCE = flags.DEFINE_string(
  "source", "text", "text (files, see --path), c4, or hub:NAME[:SUBSET] (a Hugging Face dataset)"
)
PATH = flags.DEFINE_string(
  "path", "", "glob of text, JSON lines or Parquet files, possibly compressed; with --source=c4: files of a local copy"
)
EVAL_PATH = flags.DEFINE_string(
  "eval_path", "", "glob of validation files; by default, the last 1% of the rows is held out"
)
FIELD_NAME = flags.DEFINE_string("field", FIELD, "JSON key or Parquet column that holds the text")
ROWS_WITHOUT_TEXT = flags.DEFINE_enum(
  "bad_rows", BAD_ROWS[0], BAD_ROWS, "rows without text end the preparation (stop), or are counted and left out (skip)"
)
TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "SentencePiece model, tokenizer.json, folder with one, or hub:NAME[@REVISION]; or train:SIZE (SentencePiece) or "
  "train_bytes:SIZE (byte-level) to train one on the text",
)
PACKING = flags.DEFINE_enum(
  "packing",
  shards.PACKINGS[0],
  shards.PACKINGS,
  "documents are joined and cut into rows (pack), or each is cut or padded to one row (pad)",
)
SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "tokens per row", lower_bound=2)
TAKE = flags.DEFINE_integer("take", None, "maximum number of training documents, counted from the first", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "folder to fill, or to continue")
cli.define_quiet()


def corpus_from_flags() -> corpus.Corpus:
  """Opens the corpus that --source, --path and --eval_path name."""
  source, path = SOURCE.value, PATH.value
  if source not in ("text", "c4") and not source.startswith(corpus.HUB):
    raise UserError(f"--source (={source!r}) must be text, c4, or hub:NAME, as in {corpus.C4}")
  if source.startswith(corpus.HUB) and path:
    raise UserError(f"--path (={path!r}) is not used with --source={source}; leave out one of them")
  hub = corpus.C4 if source == "c4" and not path else source if source.startswith(corpus.HUB) else None
  return corpus.open_corpus(hub or path, EVAL_PATH.value, RowOptions(FIELD_NAME.value, ROWS_WITHOUT_TEXT.value, "--"))


def tokenizer_from_flags() -> str:
  """Checks and returns --tokenizer."""
  value = TOKENIZER.value
  if value is None:
    raise UserError(
      "--tokenizer is missing: pass a SentencePiece model or a tokenizer.json, or train:32000 to train one with 32,000 "
      "pieces"
    )
  if tokenizer.size_to_train(value, "--tokenizer") is not None:
    return value
  path = tokenizer.locate(value, "--tokenizer")
  tokenizer.load_tokenizer(path)
  return str(path)


def training_command(folder: Path, manifest: dict, rows: int) -> str:
  """The command that trains the default model on the folder, with the settings that must differ from its config.

  Args:
    folder: the prepared folder.
    manifest: its manifest.
    rows: number of training rows.
  """
  config, seq_len = llama_tiny.get_config(), manifest["request"]["seq_len"]
  pieces = tokenizer.load_tokenizer(tokenizer_in(folder)).size
  epochs = -(-config.steps * config.batch_size // rows)
  settings = {"data.source": "prepared", "data.path": folder, "seq_len": seq_len}
  settings |= {"data.packing": packing} if (packing := shards.packing_of(manifest)) != config.data.packing else {}
  settings |= {"model.vocab_size": pieces} if pieces != config.model.vocab_size else {}
  settings |= {"data.epochs": epochs} if epochs > config.data.epochs else {}
  flags = [shlex.quote(f"--config.{key}={value}") for key, value in settings.items()]
  return f"python -m experiments.pretrain --workdir={shlex.quote(f'runs/{folder.name}')} {' '.join(flags)}"


def main():
  """Checks the flags, fills the folder and prints its sizes."""
  if not OUT.value:
    raise UserError("--out is missing: set the folder to fill, for example --out=data/c4_512")
  folder, text = Path(OUT.value).expanduser(), corpus_from_flags()
  origin = [[part.origin() for part in parts or ()] for parts in (text.train, text.valid)]
  tokens = tokenizer_from_flags()
  request = preparation.Request(
    origin,
    tokens,
    SEQ_LEN.value,
    TAKE.value,
    field=FIELD_NAME.value,
    bad_rows=ROWS_WITHOUT_TEXT.value,
    packing=PACKING.value,
  )
  manifest = preparation.fill_folder(folder, request, lambda: text, wait=False, progress=not flags.FLAGS.quiet)
  summary = folders.summarize_folder(manifest, SOURCE.value)
  print(report.describe_data(summary))
  if not all(summary[split]["rows"] for split in ("train", "valid")):
    raise UserError(f"{folder} is finished but has too little text for --seq_len={SEQ_LEN.value}; see the rows above")
  print(f"train on it: {training_command(folder, manifest, summary['train']['rows'])}")


if __name__ == "__main__":
  cli.run(main, continues=True)
