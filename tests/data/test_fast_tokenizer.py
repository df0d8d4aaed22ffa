import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED
from tiny import DOCUMENTS, packing_in
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from switchlora_jax.data import corpus, fast_tokenizer, packing, tokenizer
from switchlora_jax.data.readers import BadRow, RowOptions
from switchlora_jax.errors import UserError

C4 = SHARED / "c4_sample" / "c4_validation_2k.jsonl.gz"
NASTY = [
  "", " ", "  a \u00a0 b\r\n\t", "é e\u0301 漢字 👩‍👩‍👧‍👦🏳️‍🌈", "a\0b", "\U000e0fff\uffff\u0378",
  "a" * 3000, " " * 500, "\n" * 500,
  "</s><|endoftext|> a<|endoftext|><|endoftext|>", "<0x41><unk>▁", "12345 ½ ² ٣", "\ufeff\u202e\ufffd", "ĠĊÃ",
]  # fmt: skip
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("fast") / "tokenizer.json"
  tokenizer.train_tokenizer(DOCUMENTS, 320, path)
  return path


@pytest.fixture(scope="module")
def trained(path):
  return tokenizer.load_tokenizer(path)


@pytest.fixture(scope="module")
def library(path):
  """The tokenizer as the library loads it, with the literal text of special tokens as text."""
  found = tokenizers.Tokenizer.from_file(str(path))
  found.encode_special_tokens = True
  return found


def unigram(folder, special=("</s>",), **parts):
  """Writes a unigram tokenizer.json whose vocabulary has `</s>` as a piece, as T5's has; returns its path."""
  pieces = ["<unk>", "</s>", "<s>", *"▁<>/saeit", "▁a"]
  made = tokenizers.Tokenizer(models.Unigram([(piece, -float(len(piece))) for piece in pieces], 0, False))
  made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  made.add_special_tokens(list(special))
  for name, part in parts.items():
    setattr(made, name, part)
  made.save(str(folder / "tokenizer.json"))
  return folder / "tokenizer.json"


# Ids.


def test_ids_are_those_of_the_library(trained, library):
  expected = [encoding.ids for encoding in library.encode_batch(NASTY, add_special_tokens=False)]
  assert trained.encode(NASTY) == trained.encode(NASTY, parallel=False) == expected


def test_ids_of_c4_are_those_of_the_library(trained, library):
  if not C4.exists():
    pytest.skip("the sample of C4 is not available")
  texts = ["".join(packing.pieces_of(document)) for document in corpus.LocalFile(str(C4))]
  assert len(texts) == 2000
  assert trained.encode(texts) == [found.ids for found in library.encode_batch(texts, add_special_tokens=False)]


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_comes_back_and_has_no_eos(trained, text):
  (ids,) = trained.encode([text])
  assert trained.decode(ids) == text and trained.eos not in ids and not trained.unknown(text)
  assert b"".join(map(trained.token_bytes, ids)) == text.encode()


@given(TEXTS)
def test_decoding_inverts_encoding(trained, text):
  (ids,) = trained.encode([text])
  assert trained.decode(ids) == text and b"".join(map(trained.token_bytes, ids)) == text.encode()


@given(texts=st.lists(TEXTS, max_size=4), group=st.integers(1, 50))
def test_documents_in_chunks_come_back(trained, texts, group):
  with packing_in(group):
    groups = list(packing.encode_chunks(trained, packing.read_chunks([texts])))
  tokens = [token for found in groups for token in found.tokens.tolist()]
  documents, whole = [], [text for text in texts if text]
  for _ in whole:
    end = tokens.index(trained.eos)
    documents.append(b"".join(map(trained.token_bytes, tokens[:end])).decode())
    tokens = tokens[end + 1 :]
  assert documents == whole and not tokens


def test_each_digit_is_a_token(trained):
  (ids,) = trained.encode(["12 345"])
  assert [trained.token_bytes(token) for token in ids] == [b"1", b"2", b" ", b"3", b"4", b"5"]


def test_settings_of_the_file_do_not_change_ids(trained, path, tmp_path):
  made = tokenizers.Tokenizer.from_file(str(path))
  made.enable_truncation(3)
  made.enable_padding(length=50, pad_id=7, pad_token="x")
  made.model.dropout = 0.9
  made.post_processor = processors.TemplateProcessing(
    single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
  )
  made.save(str(tmp_path / "tokenizer.json"))
  found = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
  assert found.encode(DOCUMENTS) == trained.encode(DOCUMENTS)
  assert (found.prefix, trained.prefix) == ((found.eos,), ())


def test_a_unigram_model_with_eos_as_a_piece_never_gives_it_for_text(tmp_path):
  path = unigram(tmp_path)
  library = tokenizers.Tokenizer.from_file(str(path))
  library.encode_special_tokens = True
  found = tokenizer.load_tokenizer(path)
  (ids,) = found.encode(["a</s>a"])
  assert found.eos in library.encode("a</s>a").ids and found.eos not in ids
  assert "".join(found.decode(ids).split()) == "a</s>a"
  assert found.encode(["a sat"]) == [library.encode("a sat").ids]


def test_literal_text_of_any_special_token_is_text(trained, path, tmp_path):
  library = tokenizers.Tokenizer.from_file(str(path))
  library.add_special_tokens(["<pad>"])
  library.save(str(tmp_path / "tokenizer.json"))
  assert tokenizer.load_tokenizer(tmp_path / "tokenizer.json").encode(["a<pad>"]) == trained.encode(["a<pad>"])


def test_added_tokens_that_are_not_special_are_tokens_of_text(tmp_path):
  path = unigram(tmp_path)
  library = tokenizers.Tokenizer.from_file(str(path))
  library.add_tokens(["<tool>"])
  library.save(str(path))
  found = tokenizer.load_tokenizer(path)
  assert found.size == library.get_vocab_size() == library.token_to_id("<tool>") + 1
  (ids,) = found.encode(["a<tool>"])
  assert ids[-1] == found.size - 1 and found.token_bytes(ids[-1]) == b"<tool>"


def test_text_without_tokens_is_named(tmp_path):
  found = tokenizer.load_tokenizer(unigram(tmp_path, normalizer=normalizers.Replace("!", "")))
  assert found.unknown("a sat") == []
  assert found.unknown("a é sat!") == ["é", "!"]


def test_tokens_of_bytes_and_words_have_their_bytes(tmp_path):
  vocab = {"<unk>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "▁a": 4}
  made = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
  made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
  made.save(str(tmp_path / "byte.json"))
  found = tokenizer.load_tokenizer(tmp_path / "byte.json")
  assert list(map(found.token_bytes, [0, 2, 3, 4])) == [b"", b"\xc3", b"\xa9", b" a"]
  words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "[EOS]": 1, "##s": 2}, unk_token="[UNK]"))
  words.decoder = decoders.WordPiece()
  words.save(str(tmp_path / "words.json"))
  assert tokenizer.load_tokenizer(tmp_path / "words.json").token_bytes(2) == b"s"


def test_the_size_counts_gaps_between_ids(tmp_path):
  made = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "[UNK]": 1, "a": 9}, unk_token="[UNK]"))
  made.save(str(tmp_path / "gaps.json"))
  found = tokenizer.load_tokenizer(tmp_path / "gaps.json")
  assert found.size == 10 and found.token_bytes(5) == b""
  with pytest.raises(UserError, match=r"vocabulary \(=9\); it has 10 pieces; pass --config\.model\.vocab_size=10"):
    tokenizer.check_vocabulary(tmp_path / "gaps.json", 9)


def test_a_tokenizer_that_changes_text_is_found(trained, tmp_path):
  assert tokenizer.lossy_example(trained) is None
  for change in (normalizers.Lowercase(), normalizers.NFKC(), normalizers.StripAccents()):
    folder = tmp_path / type(change).__name__
    folder.mkdir()
    library = tokenizers.Tokenizer.from_str(trained._library.to_str())
    library.normalizer = normalizers.Sequence([normalizers.NFD(), change])
    library.save(str(folder / "tokenizer.json"))
    text, found = tokenizer.lossy_example(tokenizer.load_tokenizer(folder / "tokenizer.json"))
    assert text != found and found


# Special tokens.


@pytest.mark.parametrize(
  ("file", "contents"),
  [
    ("tokenizer_config.json", {"eos_token": "<s>"}),
    ("tokenizer_config.json", {"eos_token": {"content": "<s>", "special": True}}),
    ("special_tokens_map.json", {"eos_token": "<s>"}),
    ("generation_config.json", {"eos_token_id": 2}),
    ("config.json", {"eos_token_id": [2], "bos_token_id": 1}),
  ],
)
def test_eos_is_that_of_the_files_beside(tmp_path, file, contents):
  path = unigram(tmp_path, ["</s>", "<s>"])
  before = tokenizer.tokenizer_sha256(path)
  assert tokenizer.load_tokenizer(path).eos == 1, "the only known name"
  (tmp_path / file).write_text(json.dumps(contents))
  found = tokenizer.load_tokenizer(path)
  assert (found.eos, found.bos) == (2, contents.get("bos_token_id")) and tokenizer.tokenizer_sha256(path) != before


def test_the_checksum_covers_the_file_and_eos_alone(tmp_path):
  path = unigram(tmp_path)
  before = tokenizer.tokenizer_sha256(path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "x"}))
  assert tokenizer.tokenizer_sha256(path) == before
  unigram(tmp_path, ["</s>", "<s>"])
  assert tokenizer.tokenizer_sha256(path) != before


def test_a_tokenizer_without_one_clear_eos_is_a_user_error(tmp_path):
  message = r"must have an end-of-sequence token.*no file beside it names one .* and {}.*; call it tokenizer\.json, and"
  path = unigram(tmp_path, ["</s>", "<eos>"])
  with pytest.raises(UserError, match=message.format("it has </s> and <eos>")):
    tokenizer.load_tokenizer(path)
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
  with pytest.raises(UserError, match=message.format("it has </s> and <eos>")):
    tokenizer.load_tokenizer(path)
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
  with pytest.raises(UserError, match=r"it has no token '<end>'; correct eos_token in tokenizer_config\.json"):
    tokenizer.load_tokenizer(path)
  tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "other.json"))
  with pytest.raises(UserError, match=message.format(r"it has none of <\|endoftext\|>, </s>")):
    tokenizer.load_tokenizer(tmp_path / "other.json")


def test_an_invalid_file_is_a_user_error(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match=r"must be a tokenizer\.json of the tokenizers library; reading it failed"):
    tokenizer.load_tokenizer(tmp_path / "tokenizer.json")


# Training.


def test_a_trained_tokenizer_has_eos_first_and_the_size_asked_for(trained, path):
  assert (trained.eos, trained.bos, trained.pad, trained.prefix) == (0, None, None, ())
  assert fast_tokenizer.SMALLEST < trained.size <= 320
  frequent, rare = trained.encode([" the tide", "eht edit"])
  assert len(frequent) < len(rare)
  assert json.loads(path.with_name("tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


def test_training_is_deterministic(path, tmp_path):
  row = BadRow("a.jsonl, line 2", "text", "null", "mend it", RowOptions())
  pieces = [text if number % 2 else [text[:7], text[7:]] for number, text in enumerate(DOCUMENTS)]
  tokenizer.train_tokenizer([row, *pieces], 320, tmp_path / "tokenizer.json")
  tokenizer.train_tokenizer(DOCUMENTS + ["Rocks, rocks, rocks."] * 9, 320, tmp_path / "other.json")
  assert (tmp_path / "tokenizer.json").read_bytes() == path.read_bytes() != (tmp_path / "other.json").read_bytes()


def test_training_reads_no_more_than_its_sample(monkeypatch, tmp_path):
  monkeypatch.setattr(tokenizer, "SAMPLE", 100)
  documents = iter(["The tide rises. " * 4] * 3)
  tokenizer.train_tokenizer(documents, 300, tmp_path / "tokenizer.json")
  assert len(list(documents)) == 1


@pytest.mark.parametrize(
  ("documents", "size", "found"),
  [(DOCUMENTS, 256, "256 are bytes"), ([], 320, "is empty"), (["", ""], 320, "is empty")],
)
def test_no_text_or_too_small_a_vocabulary_is_a_user_error(tmp_path, documents, size, found):
  with pytest.raises(UserError, match=f"could not train a tokenizer of {size} pieces.*{found}"):
    tokenizer.train_tokenizer(documents, size, tmp_path / "tokenizer.json")
  assert not list(tmp_path.iterdir())


def test_an_error_of_the_text_is_raised_as_it_is(tmp_path):
  error = BadRow("a.jsonl, line 2", "text", "null", "mend it", RowOptions())

  def documents():
    yield "The tide rises."
    raise error

  with pytest.raises(BadRow) as caught:
    tokenizer.train_tokenizer(documents(), 320, tmp_path / "tokenizer.json")
  assert caught.value is error and not list(tmp_path.iterdir())
