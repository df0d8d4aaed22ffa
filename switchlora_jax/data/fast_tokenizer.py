"""Tokenizers of the `tokenizers` library: `tokenizer.json`, with the special tokens that the files beside it name."""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from switchlora_jax.errors import UserError
from switchlora_jax.runs.files import write_bytes
from switchlora_jax.runs.tokenizer_files import BESIDE, MODEL_CONFIG, NAMES_TOKENS, special_token

ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>", "<｜end▁of▁sentence｜>")
END = ENDS[0]  # EOS of the tokenizers that `train_byte_level` makes
SMALLEST = 257  # the 256 bytes and EOS


class FastTokenizer:
  """A `tokenizer.json`, which implements `data.tokenizer.Tokenizer`.

  Text is encoded without special tokens, truncation, padding and dropout, whatever the file asks for. The literal text
  of a special token is encoded as its characters, except by models whose vocabulary has it as a piece of text (some
  unigram models); these still never give EOS. Added tokens that are not special are tokens in the text as well.
  """

  def __init__(self, path: Path):
    name = f"the tokenizer {str(path)!r}"
    try:
      self._library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
      raise UserError(
        f"{name} must be a tokenizer.json of the tokenizers library; reading it failed ({error}); pass another, or let "
        "one be trained"
      ) from error
    self._library.no_truncation()
    self._library.no_padding()
    self._library.encode_special_tokens = True
    for randomness in ("dropout", "alpha", "nbest_size"):
      if getattr(self._library.model, randomness, None) is not None:
        setattr(self._library.model, randomness, None)
    self.size = max(self._library.get_vocab().values(), default=-1) + 1  # ids may have gaps
    self.eos = self._end(path, name)
    self.bos, self.pad = (self._special(path, name, which) for which in ("bos", "pad"))
    self.prefix = self._prefix()
    self._added = self._library.get_added_tokens_decoder()
    self._decoders = _decoder_types(self._library.decoder)
    self._end_as_text = self._text_of_end()

  def encode(self, texts: Sequence[str], parallel: bool = True) -> list[list[int]]:
    """See `Tokenizer.encode`."""
    # The library encodes the texts of a call in parallel. encode_batch_fast gives the same ids without offsets.
    groups = [texts] if parallel else [[text] for text in texts]
    return [
      self._without_end(encoding.ids)
      for group in groups
      for encoding in self._library.encode_batch_fast(group, add_special_tokens=False)
    ]

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer.decode`."""
    return self._library.decode(list(ids), skip_special_tokens=True)

  def token_bytes(self, token: int) -> bytes:
    """See `Tokenizer.token_bytes`."""
    text = self._library.id_to_token(token)
    if text is None or token == self._unknown:
      return b""
    if token in self._added:
      return b"" if self._added[token].special else text.encode()
    if "ByteLevel" in self._decoders:
      return b"".join(bytes([BYTES[letter]]) if letter in BYTES else letter.encode() for letter in text)
    if "ByteFallback" in self._decoders and re.fullmatch("<0x[0-9A-F]{2}>", text):
      return bytes([int(text[3:5], 16)])
    if "WordPiece" in self._decoders:
      return text.removeprefix("##").encode()
    return text.replace("▁", " ").encode()

  def unknown(self, text: str) -> list[str]:
    """See `Tokenizer.unknown`."""
    encoding = self._library.encode(text, add_special_tokens=False)
    pairs = zip(encoding.ids, encoding.offsets, strict=True)
    unknown = [text[start:stop] for token, (start, stop) in pairs if token == self._unknown]
    dropped = [letter for letter in text if not letter.isspace() and not self.encode([letter])[0]]
    return unknown + dropped

  @functools.cached_property
  def _unknown(self) -> int | None:
    """The id of the unknown token. Unigram models show it in their state alone, which takes a while to read."""
    model = self._library.model
    if isinstance(model, tokenizers.models.Unigram):
      return json.loads(model.__getstate__())["unk_id"]
    return self._id_of(model.unk_token)

  def _prefix(self) -> tuple[int, ...]:
    """The ids that the file's post-processor puts before a text."""
    encoding = self._library.encode("a", add_special_tokens=True)
    special = encoding.special_tokens_mask
    return tuple(encoding.ids[: special.index(0)] if 0 in special else encoding.ids)

  def _without_end(self, ids: list[int]) -> list[int]:
    if self.eos not in ids:
      return ids
    return [token for one in ids for token in (self._end_as_text if one == self.eos else [one])]

  def _text_of_end(self) -> list[int]:
    """The ids of the characters of EOS's name. A model that has the name as a piece cannot find it in two halves."""
    name = self._library.id_to_token(self.eos)
    halves = self._library.encode_batch([name[:1], name[1:]], add_special_tokens=False)
    return [token for half in halves for token in half.ids if token != self.eos]

  def _id_of(self, token: str | int | None) -> int | None:
    """The id of a token, given as a name or an id; None if the vocabulary lacks it."""
    if isinstance(token, str):
      return self._library.token_to_id(token)
    return token if token is not None and self._library.id_to_token(token) is not None else None

  def _special(self, path: Path, name: str, which: str) -> int | None:
    """The id of a special token that the files beside the tokenizer name; None if they name none."""
    token = special_token(path, which)
    found = self._id_of(token)
    if which == "eos" and token is not None and found is None:
      raise UserError(
        f"{name} must contain the end-of-sequence token that the files beside it name; it has no token {token!r}; "
        f"correct eos_token in {NAMES_TOKENS}"
      )
    return found

  def _end(self, path: Path, name: str) -> int:
    """The id of EOS: the one that the files beside the tokenizer name, or else the only one of `ENDS` that it has."""
    if (named := self._special(path, name, "eos")) is not None:
      return named
    known = [token for token in ENDS if self._id_of(token) is not None]
    if len(known) == 1:
      return self._id_of(known[0])
    found = f"it has {' and '.join(known)}" if known else f"it has none of {', '.join(ENDS)}"
    raise UserError(
      f"{name} must have an end-of-sequence token, to mark the end of a document; no file beside it names one "
      f"({', '.join([*BESIDE[:3], MODEL_CONFIG])}), and {found}; call it tokenizer.json, and write a {NAMES_TOKENS} "
      'with {"eos_token": "…"} beside it'
    )


def train_byte_level(texts: Iterable[str], vocab_size: int, path: Path) -> None:
  """Trains a byte-level byte-pair tokenizer; writes it to `path`, and tokenizer_config.json beside it, atomically.

  Text is cut as by GPT-2's pre-tokenizer, and each digit is a token. Since the 256 bytes are tokens, every text can be
  encoded, and decoding gives it back unchanged. EOS is `<|endoftext|>` with id 0, the only special token.
  Deterministic: the same texts give the same file.

  Args:
    texts: the training text.
    vocab_size: maximum number of tokens. A short text may yield fewer.
    path: the file to write.

  Raises:
    UserError: the text is empty, or the vocabulary is too small.
  """
  if vocab_size < SMALLEST:
    raise UserError(
      f"could not train a tokenizer of {vocab_size} pieces: 256 are bytes and one is EOS; use {SMALLEST} or more"
    )
  empty = True

  def counted():
    nonlocal empty
    for text in texts:
      empty = empty and not text
      yield text

  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  split = tokenizers.pre_tokenizers
  made.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)])
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    initial_alphabet=sorted(split.ByteLevel.alphabet()),
    special_tokens=[END],
    show_progress=False,
  )
  made.train_from_iterator(counted(), trainer)
  if empty:
    raise UserError(
      f"could not train a tokenizer of {vocab_size} pieces on this text: the text is empty; use more text, or pass a "
      "tokenizer"
    )
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
  write_bytes(path.with_name(NAMES_TOKENS), (json.dumps(config, indent=2) + "\n").encode())
  write_bytes(path, made.to_str().encode())


def _decoder_types(decoder) -> set[str]:
  """The types of a decoder and of those that it consists of."""
  state = json.loads(decoder.__getstate__()) if decoder else {}
  return {state.get("type"), *(part.get("type") for part in state.get("decoders", []))}


def _byte_letters() -> dict[str, int]:
  """{letter: byte}: GPT-2's letters for bytes, which are printable. Other bytes have the letters from U+0100 on."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_letters()
