"""Tokenizers of Hugging Face folders: special ids, and what `transformers` prepends to a text.

Converts a SentencePiece model to the `tokenizer.json` that `transformers` loads, with the same ids for a text.

`transformers` cannot do this conversion: its tokenizer classes for LLaMA and T5 each build their own normalizer, which
adds a space that SentencePiece does not add, or drops spaces that it keeps.
"""

import base64
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as proto

from switchlora_jax.data.tokenizer import load_tokenizer
from switchlora_jax.runs.files import read_json_object
from switchlora_jax.runs.tokenizer_files import NAMES_TOKENS as CONFIG
from switchlora_jax.runs.tokenizer_files import is_fast, tokenizer_in

Model, Trainer = proto.ModelProto, proto.TrainerSpec  # type: ignore[attr-defined]  # made by protobuf at import
Piece = Model.SentencePiece
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")  # prepend BOS by default
SPACE = "▁"  # stands for a space in SentencePiece
APPROXIMATE = (
  "tokenizer.json only approximates a tokenizer of this kind: transformers encodes the literal text of a special "
  "piece, such as </s>, as that piece, and rare text, such as a letter with two accents or a long run of one letter, "
  "may get other ids than in training"
)
PREPENDS = (
  "tokenizer.json prepends a special token to a text, which training did not; encode with add_special_tokens=False"
)


def special_ids(path: Path) -> dict[str, int | None]:
  """bos_token_id, eos_token_id and pad_token_id of a tokenizer; None for a token that it lacks."""
  model = load_tokenizer(path)
  return {"bos_token_id": model.bos, "eos_token_id": model.eos, "pad_token_id": model.pad}


def convert(path: Path, seq_len: int) -> tuple[dict[str, dict], list[str]]:
  """Converts a SentencePiece model. A tokenizer.json needs no conversion.

  A byte-pair model from `data.tokenizer.train_tokenizer` gives the same ids for any text.

  Args:
    path: of the tokenizer.
    seq_len: model_max_length.
  Returns:
    ({file name: contents}, remarks): tokenizer.json and tokenizer_config.json, or no files if the kind of model cannot
    be converted; a remark per reason why ids may differ or files are missing.
  """
  if is_fast(path):
    return {}, [PREPENDS] if load_tokenizer(path).prefix else []
  model = Model.FromString(path.read_bytes())
  if reason := _inconvertible(model):
    return {}, [f"{path.name} is written, tokenizer.json is not, since it {reason}: load it with sentencepiece"]
  contents = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": {"type": "Sequence", "normalizers": _normalizers(model.normalizer_spec)},
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": {"type": "Sequence", "decoders": _decoders(model)},
    "model": _byte_pair(model) if _is_byte_pair(model) else _unigram(model),
  }
  exact = _is_byte_pair(model) and not model.normalizer_spec.precompiled_charsmap
  files = {"tokenizer.json": contents, CONFIG: _config(path, model, seq_len)}
  return files, [] if exact else [APPROXIMATE]


def prefix(folder: Path) -> tuple[int, ...]:
  """The ids that `transformers` prepends to a text.

  tokenizer_config.json decides with `add_bos_token`. Without this key, the post-processor of a tokenizer.json does, and
  if it adds nothing, or for a SentencePiece model, BOS is prepended if LLaMA's tokenizer class is named.
  """
  path = tokenizer_in(folder)
  if not path.exists():
    return ()
  config = read_json_object(folder / CONFIG) if (folder / CONFIG).exists() else {}
  tokenizer, add_bos = load_tokenizer(path), config.get("add_bos_token")
  if add_bos is None and tokenizer.prefix:
    return tokenizer.prefix
  add_bos = config.get("tokenizer_class") in LLAMA_CLASSES if add_bos is None else add_bos
  return (tokenizer.bos,) if add_bos and tokenizer.bos is not None else ()


def _is_byte_pair(model) -> bool:
  return model.trainer_spec.model_type == Trainer.BPE


def _inconvertible(model) -> str | None:
  """The reason why a model cannot be converted, or None."""
  trainer, kinds = model.trainer_spec, {piece.type for piece in model.pieces}
  if trainer.model_type not in (Trainer.BPE, Trainer.UNIGRAM):
    return f"is a model of {Trainer.ModelType.Name(trainer.model_type).lower()}s"
  if trainer.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
    return "does not write a space before a word"
  if _is_byte_pair(model) and kinds & {Piece.USER_DEFINED, Piece.UNUSED}:
    return "has user-defined pieces"
  return None


def _config(path: Path, model, seq_len: int) -> dict:
  """The contents of tokenizer_config.json; LLaMA's tokenizer class would ignore the normalizer."""
  special = special_ids(path)
  names = {name.removesuffix("_id"): model.pieces[i].piece for name, i in special.items() if i is not None}
  return {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **names,
    "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
    "split_special_tokens": True,  # the text </s> is encoded as its characters, as in SentencePiece
    "clean_up_tokenization_spaces": False,
    "model_max_length": seq_len,
  }


def _replace(pattern: dict, content: str) -> dict:
  return {"type": "Replace", "pattern": pattern, "content": content}


def _normalizers(spec) -> list[dict]:
  """Normalizers in SentencePiece's order; it treats only U+0020 as a space."""
  found = []
  if spec.precompiled_charsmap:
    charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
    found.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
  if spec.remove_extra_whitespaces:
    found += [_replace({"Regex": "^ +"}, ""), _replace({"Regex": " {2,}"}, " ")]
  found.append(_replace({"String": " "}, SPACE))
  if spec.remove_extra_whitespaces:
    found.append(_replace({"Regex": f"{SPACE}+$"}, ""))
  if spec.add_dummy_prefix:
    found.append({"type": "Prepend", "prepend": SPACE})
  return found


def _decoders(model) -> list[dict]:
  bytes_too = [{"type": "ByteFallback"}] if model.trainer_spec.byte_fallback else []
  prefix = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
  strip = [prefix] if model.normalizer_spec.add_dummy_prefix else []
  return [_replace({"String": SPACE}, " "), *bytes_too, {"type": "Fuse"}, *strip]


def _byte_pair(model) -> dict:
  """Merges of two ordinary pieces whose concatenation is an ordinary piece, in descending order of its score."""
  ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
  scores = {piece.piece: piece.score for piece in model.pieces if piece.type == Piece.NORMAL}
  cuts = ((piece, piece[:i], piece[i:]) for piece in scores for i in range(1, len(piece)))
  merges = [(-scores[piece], ids[a], ids[b], a, b) for piece, a, b in cuts if a in scores and b in scores]
  return {
    "type": "BPE",
    "dropout": None,
    "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": model.trainer_spec.byte_fallback,
    "ignore_merges": False,
    "vocab": ids,
    "merges": [[a, b] for *_, a, b in sorted(merges)],
  }


def _unigram(model) -> dict:
  return {
    "type": "Unigram",
    "unk_id": model.trainer_spec.unk_id,
    "vocab": [[piece.piece, piece.score] for piece in model.pieces],
    "byte_fallback": model.trainer_spec.byte_fallback,
  }
