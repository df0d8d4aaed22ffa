"""With a converted tokenizer.json, `transformers` gives the token ids of SentencePiece."""

import functools
import hashlib
import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN, SHARED

from switchlora_jax.data.tokenizer import load_tokenizer
from switchlora_jax.interop import tokenizer_json

BPE, UNIGRAM = (GOLDEN / "huggingface" / f"{kind}.model" for kind in ("bpe", "unigram"))
T5 = SHARED / "t5_tokenizer" / "t5_32100.model"
SPECIAL = "</s><pad> <0x0A>"
with_transformers = functools.partial(
  pytest.importorskip, "transformers", reason="needs requirements-torch.txt; its recorded ids are compared anyway"
)


@pytest.mark.parametrize("path", [BPE, UNIGRAM], ids=["bpe", "unigram"])
def test_the_recorded_ids_of_transformers_are_those_of_sentencepiece(golden, path):
  """Recorded with these files. Unigram models differ for the text of special pieces, which a remark reports."""
  recorded, meta = golden("huggingface")
  files, _ = tokenizer_json.convert(path, 32)
  for name, content in files.items():
    made = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert made == meta["sha256"][f"{path.stem}/{name}"], "the conversion has changed; record its ids again"
  model, differ = load_tokenizer(path), []
  for number, text in enumerate(meta["texts"]):
    if model.encode([text])[0] != recorded[f"{path.stem}/{number}"].tolist():
      differ.append(text)
  assert len(meta["texts"]) == 11 and differ == ([SPECIAL] if path == UNIGRAM else [])


def loaded(path, folder):
  """The tokenizer as `transformers` loads it, and SentencePiece's."""
  transformers = with_transformers()
  for name, content in tokenizer_json.convert(path, 512)[0].items():
    (folder / name).write_text(json.dumps(content))
  (folder / "config.json").write_text('{"model_type": "llama"}')
  (folder / "tokenizer.model").write_bytes(path.read_bytes())  # LLaMA's own tokenizer class would prefer this file
  return transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(path)


def test_transformers_gives_the_same_ids_for_any_text_of_a_byte_pair_model(tmp_path):
  theirs, ours = loaded(BPE, tmp_path)
  assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id, theirs.unk_token_id) == (1, 0, None, 2)

  @settings(max_examples=500, deadline=None)
  @given(
    st.one_of(
      st.text(), st.text("ab wave-\n\t▁é1"), st.lists(st.sampled_from(["</s>", "<0x0A>", "a", " "])).map("".join)
    )
  )
  def check(text):
    ids = ours.encode([text])[0]
    assert theirs(text, add_special_tokens=False).input_ids == ids == theirs(text).input_ids
    assert theirs.decode(ids) == ours.decode(ids)

  check()


def test_transformers_gives_the_same_ids_for_ordinary_text_of_t5s_model(tmp_path):
  if not T5.exists():
    pytest.skip("T5's SentencePiece model is missing; another test uses a small unigram model")
  theirs, ours = loaded(T5, tmp_path)
  for text in (
    "The tide  rises;\n\n it falls. ",
    "Straße, déjà vu: ½ ﬁ ™ ①",
    "日本語 привет",
    "",
    " \n",
    "e\u0301",
  ):
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode([text])[0], text


# --- approximate and unsupported conversions ----------------------------------------------------------------------


def made(path, **options):
  """Trains a SentencePiece model without this package."""
  model = io.BytesIO()
  settings = {"vocab_size": 60, "hard_vocab_limit": False, "model_type": "bpe", "minloglevel": 2} | options
  text = ["the tide rises and the tide falls", "waves break on the shore"] * 5
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **settings)
  path.write_bytes(model.getvalue())
  return path


def test_special_pieces(tmp_path):
  assert tokenizer_json.special_ids(BPE) == {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
  other = made(tmp_path / "other.model")
  assert tokenizer_json.special_ids(other) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
  config = tokenizer_json.convert(other, 9)[0]["tokenizer_config.json"]
  assert {key: config[key] for key in config if key.endswith("token")} == {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"
  }  # fmt: skip
  assert config["model_max_length"] == 9


@pytest.mark.parametrize(
  ("config", "prefix"),
  [
    ({"add_bos_token": True}, (1,)),
    ({"tokenizer_class": "LlamaTokenizer"}, (1,)),
    ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, ()),
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, ()),
    (None, ()),
  ],
)
def test_the_prefix_that_a_folder_adds_to_texts(tmp_path, config, prefix):
  made(tmp_path / "tokenizer.model")  # its BOS is 1
  path = tmp_path / "tokenizer_config.json"
  for encoding in ("utf-8", "utf-8-sig"):  # without and with a byte order mark
    if config is not None:
      path.write_text(json.dumps(config), encoding=encoding)
    assert tokenizer_json.prefix(tmp_path) == prefix


@pytest.mark.parametrize(
  ("config", "prefix"),
  [
    ({"bos_token": "<s>"}, (2,)),
    ({"bos_token": "<s>", "add_bos_token": True}, (1,)),
    ({"bos_token": "<s>", "add_bos_token": False}, ()),
    ({"add_bos_token": True}, ()),
    (None, (2,)),
  ],
)
def test_the_prefix_of_a_fast_tokenizer_is_its_post_processors_unless_the_config_decides(tmp_path, config, prefix):
  """The post-processor adds another token than BOS here, to tell them apart."""
  fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<s>": 1, "<cls>": 2, "a": 3}, unk_token="a"))
  template = tokenizers.processors.TemplateProcessing
  fast.post_processor = template(single="<cls> $A </s>", special_tokens=[("<cls>", 2), ("</s>", 0)])
  fast.save(str(tmp_path / "tokenizer.json"))
  if config is not None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  assert tokenizer_json.prefix(tmp_path) == prefix
  files, remarks = tokenizer_json.convert(tmp_path / "tokenizer.json", 9)
  assert not files and len(remarks) == 1 and "prepends a special token to a text, which training did not" in remarks[0]


def test_llamas_class_prepends_bos_to_a_fast_tokenizer_without_a_post_processor(tmp_path):
  fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<s>": 1, "a": 2}, unk_token="a"))
  fast.save(str(tmp_path / "tokenizer.json"))
  for name, prefix in {"LlamaTokenizerFast": (1,), "PreTrainedTokenizerFast": ()}.items():
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "bos_token": "<s>"}))
    assert tokenizer_json.prefix(tmp_path) == prefix
  assert tokenizer_json.convert(tmp_path / "tokenizer.json", 9) == ({}, [])


def test_there_is_no_prefix_without_bos_or_in_our_own_folders(tmp_path):
  (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
  assert tokenizer_json.prefix(tmp_path) == (), "no tokenizer.model"
  (tmp_path / "tokenizer.model").write_bytes(BPE.read_bytes())  # it has no BOS
  assert tokenizer_json.prefix(tmp_path) == ()
  files, _ = tokenizer_json.convert(made(tmp_path / "tokenizer.model"), 9)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(files["tokenizer_config.json"]))
  assert tokenizer_json.prefix(tmp_path) == (), "our exports are trained without a prefix"


def test_an_approximate_conversion_has_a_remark(tmp_path):
  assert tokenizer_json.convert(BPE, 8)[1] == []
  for path in (UNIGRAM, made(tmp_path / "nfkc.model", normalization_rule_name="nfkc")):
    files, remarks = tokenizer_json.convert(path, 8)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"} and len(remarks) == 1
    assert "only approximates a tokenizer of this kind" in remarks[0]


@pytest.mark.parametrize(
  ("options", "reason"),
  [
    ({"model_type": "word"}, "it is a model of words"),
    ({"model_type": "char"}, "it is a model of chars"),
    ({"treat_whitespace_as_suffix": True}, "it does not write a space before a word"),
    ({"user_defined_symbols": ["<mine>"]}, "it has user-defined pieces"),
  ],
)
def test_a_tokenizer_that_cannot_be_converted_has_a_remark(tmp_path, options, reason):
  files, (remark,) = tokenizer_json.convert(made(tmp_path / "other.model", **options), 8)
  assert files == {} and reason in remark and "load it with sentencepiece" in remark
