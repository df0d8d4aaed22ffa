"""The files of a tokenizer in a folder: the directory of a run, a prepared folder or a Hugging Face folder.

A tokenizer is a SentencePiece model, or a `tokenizer.json` of the `tokenizers` library with small files beside it that
name its special tokens.
"""

import json
from pathlib import Path

from switchlora_jax.runs.files import read_json_object, write_bytes

SENTENCEPIECE, FAST = "tokenizer.model", "tokenizer.json"
NAMES_TOKENS, GENERATION, MODEL_CONFIG = "tokenizer_config.json", "generation_config.json", "config.json"
# Files with the names of special tokens, files with their ids, in the order in which they are searched.
WITH_NAMES, WITH_IDS = (NAMES_TOKENS, "special_tokens_map.json"), (GENERATION, MODEL_CONFIG)
BESIDE = (*WITH_NAMES, GENERATION, "chat_template.jinja")  # kept with tokenizer.json
KEPT = (SENTENCEPIECE, FAST, *BESIDE)


def is_fast(path: str | Path) -> bool:
  """Whether `path` names a file of the `tokenizers` library: it ends in `.json`."""
  return str(path).endswith(".json")


def tokenizer_in(folder: Path) -> Path:
  """The tokenizer in a folder: tokenizer.json if it is there without a tokenizer.model, else tokenizer.model.

  The file may not exist.
  """
  alone = (folder / FAST).exists() and not (folder / SENTENCEPIECE).exists()
  return folder / (FAST if alone else SENTENCEPIECE)


def special_token(path: Path, which: str) -> str | int | None:
  """The name or the id of a special token of a `tokenizer.json`, as the files beside it give it; None if none does.

  Args:
    path: of the tokenizer. A file that is not called `tokenizer.json` has no files beside it.
    which: `eos`, `bos` or `pad`.
  Raises:
    UserError: one of the files is not a JSON object.
  """
  for name in WITH_NAMES:
    value = _beside(path, name).get(f"{which}_token")
    value = value.get("content") if isinstance(value, dict) else value
    if isinstance(value, str):
      return value
  for name in WITH_IDS:
    value = _beside(path, name).get(f"{which}_token_id")
    value = value[0] if isinstance(value, list) and len(value) == 1 else value  # several: ends of a chat's turns
    if isinstance(value, int):
      return value
  return None


def kept_files(path: Path) -> dict[str, bytes]:
  """{name: contents} of the files with which a folder keeps a tokenizer.

  Ids that only config.json gives are added to generation_config.json: config.json itself is not kept, because a run has
  a file of that name.
  """
  if not is_fast(path):
    # The conversion beside a model of a Hugging Face folder may hold a chat template that ours would not.
    converted = (FAST, *BESIDE) if path.name == SENTENCEPIECE and path.with_name(FAST).exists() else ()
    found = {name: path.with_name(name) for name in converted if path.with_name(name).exists()}
    return {SENTENCEPIECE: path.read_bytes()} | {name: file.read_bytes() for name, file in found.items()}
  files = {FAST: path.read_bytes()}
  if path.name != FAST:
    return files
  files |= {name: path.with_name(name).read_bytes() for name in BESIDE if path.with_name(name).exists()}
  generation = _beside(path, GENERATION)
  ids = {f"{which}_token_id": special_token(path, which) for which in ("bos", "eos", "pad")}
  missing = {key: value for key, value in ids.items() if isinstance(value, int) and generation.get(key) is None}
  if missing:
    files[GENERATION] = (json.dumps(generation | missing, indent=2) + "\n").encode()
  return files


def keep_tokenizer(path: Path, folder: Path) -> set[str]:
  """Writes the `kept_files` of a tokenizer to a folder, each atomically; returns their names."""
  files = kept_files(path)
  for name, contents in files.items():
    write_bytes(folder / name, contents)
  return set(files)


def _beside(path: Path, name: str) -> dict:
  """The contents of a JSON file beside a `tokenizer.json`; {} if there is none."""
  file = path.with_name(name)
  return read_json_object(file) if path.name == FAST and file.exists() else {}
