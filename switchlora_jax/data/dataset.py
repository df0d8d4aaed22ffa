"""`config.data` → a `Dataset` of packed sequences, from which `loader` makes the batch of a step.

Sequences come from a folder filled by `experiments.prepare_data`, or from a folder in `cache_dir`, which is filled on
first use. With `source=stream`, training sequences are packed while the text is read. `mixture` adds rows of other
texts to training, and `eval_also` names further validation texts.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

from switchlora_jax.data import corpus, documentation, folders, preparation, shards, texts, tokenizer
from switchlora_jax.data.folders import Dataset
from switchlora_jax.data.loader import SequenceStream
from switchlora_jax.data.mixture import Mixture, row_counts
from switchlora_jax.data.preparation import Request
from switchlora_jax.data.readers import BAD_ROWS, FIELD, RowOptions
from switchlora_jax.data.shards import PACKINGS
from switchlora_jax.errors import UserError
from switchlora_jax.runs.tokenizer_files import tokenizer_in

TOKENIZER = "--config.data.tokenizer"
MIXED = "the text {!r} of data.mixture"
SOURCES = {
  "docs": "documentation of the installed packages",
  "text": "your own files, packed into cache_dir first",
  "prepared": "a folder filled by experiments.prepare_data",
  "stream": "your own files, packed while they are read",
}


def check_data_config(config, also: bool = True) -> None:
  """Checks `config.data` before any expensive work: source, globs, tokenizer and prepared folders.

  Args:
    also: whether to check the texts of `data.eval_also` as well.

  Raises:
    UserError: a setting is invalid.
  """
  data = config.data
  if data.source not in SOURCES:
    known = ", ".join(f"{name} ({what})" for name, what in SOURCES.items())
    raise UserError(
      f"--config.data.source (={data.source!r}) must be one of {known}; "
      "for your files pass --config.data.source=text --config.data.path='c4/*.json.gz'"
    )
  if data.epochs < 1:
    raise UserError(f"data.epochs (={data.epochs}) must be at least 1; set --config.data.epochs")
  if data.bad_rows not in BAD_ROWS:
    raise UserError(f"data.bad_rows (={data.bad_rows!r}) must be {' or '.join(BAD_ROWS)}; set --config.data.bad_rows")
  if data.packing not in PACKINGS:
    raise UserError(
      f"data.packing (={data.packing!r}) must be pack (documents are joined and cut into rows) or pad (each document "
      "is one row, cut or padded); set --config.data.packing"
    )
  rows = {} if data.mixture or data.eval_also else {"field": FIELD, "bad_rows": BAD_ROWS[0]}
  unused = {"docs": ("path", "eval_path", *rows), "prepared": ("eval_path", *rows)}.get(data.source, ())
  for key in unused:
    if data[key] != rows.get(key, ""):
      raise UserError(
        f"--config.data.{key} (={data[key]!r}) is not used when --config.data.source is {data.source}; "
        "leave it out, or add --config.data.source=text to train on your files"
      )
  if data.source == "prepared":
    _check_prepared(config)
  else:
    _text_origin(data)
    _check_tokenizer(config)
  _check_further_texts(config, also)


def open_dataset(config, *, progress: bool = True, share: tuple[int, int] = (0, 1), also: bool = True) -> Dataset:
  """Opens the packed sequences that `config` trains and validates on, and makes them first if necessary.

  With `data.packing=pack`, documents are joined, each ended by EOS, and cut into sequences of `seq_len` tokens; the
  remainder is dropped. With `pad`, each document is cut or padded to one sequence. Without validation text, the last 1%
  of the training sequences, at least one, is held out.

  Args:
    config: the resolved config.
    progress: whether to show progress bars.
    share: the files to verify, see `shards.verify_checksums`.
    also: whether to open the texts of `data.eval_also` as well.

  Raises:
    UserError: `check_data_config` fails, before any expensive work; or the text is too short, or a file is damaged.
  """
  check_data_config(config, also)
  folder = _expanded(config.data.path) if config.data.source == "prepared" else _fill_cache(config, progress)
  manifest = shards.read_manifest(folder)
  shards.verify_checksums(folder, manifest, progress, share)
  if config.data.source == "stream":
    data = _open_stream(config, folder, manifest)
  else:
    _check_length(folders.split_sizes(manifest), config)
    data = folders.open_folder(folder, manifest, config.data.source)
  return _with_further_texts(data, config, progress, also)


def check_length_after_skips(data: Dataset, config, skipped: int) -> None:
  """Raises `UserError` if the data do not suffice after `skipped` batches were left out because of loss spikes.

  A stream, whose length is unknown, is not checked: it raises when it ends.
  """
  shares, parts = (), (data.train,)
  if isinstance(data.train, Mixture):
    shares, parts = data.train.shares, (data.train.main, *data.train.others)
  for text, needed in zip(parts, row_counts((config.steps + skipped) * config.batch_size, shares), strict=True):
    if isinstance(text, SequenceStream):
      continue
    if needed > (available := len(text)) * config.data.epochs:
      raise UserError(
        f"the run skips {skipped:,} batches because of loss spikes and so needs {needed:,} rows; the text has "
        f"{available:,} rows and is used data.epochs (={config.data.epochs}) times; repeat it once more: "
        f"--config.data.epochs={-(-needed // available)}"
      )


def _expanded(path: str) -> Path:
  return Path(path).expanduser()


def _check_tokenizer(config) -> None:
  """Checks the tokenizer of text that is not prepared, or the size of the one to train."""
  given, vocab_size = config.data.tokenizer, config.model.vocab_size
  size = tokenizer.size_to_train(given, TOKENIZER)
  if given and size is None:
    tokenizer.check_vocabulary(tokenizer.locate(given, TOKENIZER), vocab_size)
  elif config.data.source == "stream":
    raise UserError("--config.data.source=stream needs an existing tokenizer; set --config.data.tokenizer")
  elif size is not None and size > vocab_size:
    raise UserError(
      f"{TOKENIZER} (={given!r}) must fit into the model's vocabulary (={vocab_size}); "
      f"pass --config.model.vocab_size={size} or more, or a smaller size"
    )


def _check_prepared(config) -> None:
  """Checks that the prepared folder is finished, and that it fits the model, the tokenizer and the number of steps."""
  data, folder = config.data, _expanded(config.data.path)
  manifest = shards.read_manifest(folder)
  if manifest is None:
    unfinished = (folder / preparation.PROGRESS).exists()
    raise UserError(
      f"--config.data.path (={data.path!r}) must be a folder filled by experiments.prepare_data; "
      f"{'it is not finished: run that command again' if unfinished else 'it has no manifest.json'}"
    )
  if (found := manifest["request"]["seq_len"]) != config.seq_len:
    raise UserError(
      f"seq_len (={config.seq_len}) must be that of the prepared rows in {folder} (={found}); "
      f"set --config.seq_len={found}, or prepare the text with --seq_len={config.seq_len}"
    )
  if (made := shards.packing_of(manifest)) != data.packing:
    raise UserError(
      f"data.packing (={data.packing!r}) must be that of the prepared rows in {folder} (={made!r}); "
      f"set --config.data.packing={made}, or prepare the text with --packing={data.packing}"
    )
  if data.tokenizer:
    if tokenizer.size_to_train(data.tokenizer, TOKENIZER) is not None:
      raise UserError(
        f"{TOKENIZER} (={data.tokenizer!r}) trains a tokenizer, but the text in {folder} was prepared with one; leave "
        "it out, or prepare the text with it"
      )
    path = tokenizer.locate(data.tokenizer, TOKENIZER)
    tokenizer.load_tokenizer(path)
    if tokenizer.tokenizer_sha256(path) != manifest["tokenizer"]:
      raise UserError(
        f"--config.data.tokenizer (={data.tokenizer!r}) is not the tokenizer that {folder} was prepared with; "
        "leave it out, or prepare the text with it"
      )
  tokenizer.check_vocabulary(tokenizer_in(folder), config.model.vocab_size)
  _check_length(folders.split_sizes(manifest), config)


def _check_further_texts(config, also: bool) -> None:
  """Checks `mixture` and `eval_also`: their form, their folders and globs, and that no file has both uses."""
  data = config.data
  added, further = texts.parse_mixture(data.mixture), texts.parse_eval_also(data.eval_also) if also else []
  if not (added or further):
    return
  form = _form(config, _known_tokenizer(config))
  for text in (*added, *further):
    texts.check(text, form)
  for text, needed in zip(added, _needed_rows(config)[1:], strict=True):
    if text.folder:
      available = folders.split_sizes(shards.read_manifest(text.folder))["train"]["rows"]
      texts.check_not_empty(text, available, form)
      _check_rows(MIXED.format(text.place), available, needed, config)
  files = lambda named: [file for text in named for file in texts.local_files(text)]
  own = data.source in ("text", "stream")
  local = lambda key: list(texts.local_files(texts.Named(data[key], f"--config.data.{key}", ""))) if data[key] else []
  train, valid = (local("path"), local("eval_path")) if own else ([], [])
  texts.check_separate(train + files(added), valid + files(further))
  _check_held_out(data, added, train, files(added))


def _known_tokenizer(config) -> Path | None:
  """The tokenizer of the run; None if it is to be trained, and no earlier run on this text has trained it."""
  data = config.data
  if data.source == "prepared":
    return tokenizer_in(_expanded(data.path))
  if data.tokenizer and tokenizer.size_to_train(data.tokenizer, TOKENIZER) is None:
    return tokenizer.locate(data.tokenizer, TOKENIZER)
  folder = folders.cache_folder(data.cache_dir, data.source, _cache_request(config))
  return tokenizer_in(folder) if shards.read_manifest(folder) else None


def _check_held_out(data, added: list[texts.Named], own: list[str], mixed: list[str]) -> None:
  """Raises `UserError` if the mixture would train on rows of `data.path` that are held out for validation."""
  again = [text.place for text in added if text.place == data.path and data.path.startswith(corpus.HUB)]
  again += corpus.shared_files(own, mixed)
  if again and not data.eval_path:
    raise UserError(
      f"--config.data.mixture has {again[0]!r}, which is in data.path as well, whose last rows are held out for "
      "validation; set --config.data.eval_path to another text, or leave it out of one of them"
    )


def _form(config, model: Path | None) -> texts.Form:
  """How the run packs further texts, with the tokenizer `model`."""
  data = config.data
  return texts.Form(model, config.seq_len, data.packing, data.cache_dir, RowOptions(data.field, data.bad_rows))


def _with_further_texts(data: Dataset, config, progress: bool, also: bool) -> Dataset:
  """The dataset with the texts of `mixture` in its training rows, and those of `eval_also`."""
  form = _form(config, Path(data.tokenizer_path))
  if added := texts.parse_mixture(config.data.mixture):
    opened = [texts.open_text(text, "train", form, progress) for text in added]
    for text, packed, needed in zip(added, opened, _needed_rows(config)[1:], strict=True):
      _check_rows(MIXED.format(text.place), len(packed.rows), needed, config)
    shares = tuple(text.share for text in added)
    contents = [data.fingerprint, *map(str, shares), *(packed.fingerprint for packed in opened)]
    data = data._replace(
      train=Mixture(data.train, tuple(packed.rows for packed in opened), shares),
      fingerprint=hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16],
    )
    sizes = {
      f"mixture {text.place}": {"share": f"{float(text.share):.4g} of all rows"} | packed.sizes
      for text, packed in zip(added, opened, strict=True)
    }
    data = data._replace(summary=data.summary | {"fingerprint": data.fingerprint, "further": sizes})
  named = texts.parse_eval_also(config.data.eval_also) if also else []
  further = tuple(texts.open_text(text, "valid", form, progress) for text in named)
  sizes = {f"valid {packed.label}": packed.sizes for packed in further}
  summary = data.summary | ({"further": data.summary.get("further", {}) | sizes} if sizes else {})
  return data._replace(also=further, summary=summary)


def _text_origin(data) -> list:
  """Versions of the packages, or paths, sizes and times of the files, to detect that the text has changed."""
  if data.source == "docs":
    return documentation.origin()
  text = _open_corpus(data)
  return [[part.origin() for part in parts or ()] for parts in (text.train, text.valid)]


def _fill_cache(config, progress: bool) -> Path:
  """The cache folder with the packed text, filled if necessary. Of a stream, only the validation text is packed."""
  data, request = config.data, _cache_request(config)
  return folders.cached_folder(data.cache_dir, data.source, request, partial(_open_corpus, data, progress), progress)


def _cache_request(config) -> Request:
  """What to pack into the cache."""
  data = config.data
  origin = [data.source, _text_origin(data)]
  model = data.tokenizer or f"{tokenizer.TRAIN}{config.model.vocab_size}"
  if tokenizer.size_to_train(model, TOKENIZER) is None:
    model = str(tokenizer.locate(model, TOKENIZER))
  request = Request(origin, model, config.seq_len, packing=data.packing)
  if data.source != "docs":
    request = request._replace(field=data.field, bad_rows=data.bad_rows)
  return request


def _local_corpus(data) -> corpus.Corpus:
  """The text that `data.path` and `data.eval_path` name."""
  return corpus.open_corpus(data.path, data.eval_path, RowOptions(data.field, data.bad_rows))


def _open_corpus(data, progress: bool = False) -> corpus.Corpus:
  """The text to pack into the cache."""
  if data.source == "docs":
    return documentation.read_corpus(progress)
  text = _local_corpus(data)
  return _validation_corpus(text) if data.source == "stream" else text


def _validation_corpus(text: corpus.Corpus) -> corpus.Corpus:
  """A corpus of the validation text alone, as `train`; raises `UserError` if there is none."""
  if text.valid is None:
    raise UserError(
      "--config.data.source=stream needs validation text; set --config.data.eval_path, or use a dataset of the hub "
      "that has a split `validation`"
    )
  return corpus.Corpus(text.valid, None)


def _open_stream(config, folder: Path, manifest: dict) -> Dataset:
  """Opens the training text as a stream, and the packed validation text, which is the split `train` of the folder."""
  data, valid = config.data, manifest["train"]
  text = _local_corpus(data)
  origin = json.dumps([part.origin() for part in text.train] + ([data.field] if data.field != FIELD else []))
  fingerprint = hashlib.sha256(f"{shards.fingerprint(manifest)} {origin}".encode()).hexdigest()[:16]
  read_from = {"read from": data.path.encode(errors="backslashreplace").decode()}
  sizes = {"train": read_from, "valid": folders.printed_sizes(valid)}
  return Dataset(
    train=SequenceStream(text.train, tokenizer_in(folder), config.seq_len, data.packing == "pad"),
    valid=shards.open_sequences(folder, valid),
    tokenizer_path=str(tokenizer_in(folder)),
    fingerprint=fingerprint,
    bytes_per_token=folders.bytes_per_token(valid),
    summary={"source": data.source, "fingerprint": fingerprint} | sizes,
  )


def _needed_rows(config) -> list[int]:
  """Numbers of rows that the run needs, of its text and of each text of `data.mixture`."""
  shares = [text.share for text in texts.parse_mixture(config.data.mixture)]
  return row_counts(config.steps * config.batch_size, shares)


def _check_length(sizes: dict[str, dict], config) -> None:
  """Raises `UserError` if the run needs more training sequences than there are. `sizes` is as in the summary."""
  available = sizes["train"]["rows"]
  if not available and config.data.packing == "pad":
    raise UserError(
      "with data.packing=pad each document is one row, and the text has none besides validation; give a text of more "
      "documents, such as JSON lines, or set --config.data.packing=pack"
    )
  if not available:
    raise UserError(
      f"the text must hold at least one row of {config.seq_len} tokens besides validation; it has "
      f"{sizes['train']['tokens']:,} tokens; add text, or lower --config.seq_len"
    )
  _check_rows("the text", available, _needed_rows(config)[0], config)


def _check_rows(name: str, available: int, needed: int, config) -> None:
  """Raises `UserError` if the run needs `needed` rows of a text that has fewer in `data.epochs` passes."""
  if needed > available * config.data.epochs:
    steps, epochs = available * config.data.epochs * config.steps // needed, -(-needed // available)
    raise UserError(
      f"the run needs {needed:,} rows ({config.steps:,} steps of {config.batch_size}); {name} has {available:,} rows "
      f"of {config.seq_len} tokens, enough for {steps:,} steps with data.epochs (={config.data.epochs}); add text, "
      f"lower --config.steps, or repeat the text: --config.data.epochs={epochs}"
    )
