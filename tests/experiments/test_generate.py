"""The command that generates text: with and without a cache, as a process, and errors of prompts and flags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import small_model
from grids import command, imported
from tiny import resolved, saved_run

from switchlora_jax.data.tokenizer import load_tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.interop import export, pretrained
from switchlora_jax.training import phases

ROW = 48  # tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The directory of a run of SwitchLoRA with a checkpoint of step 0, whose logits are not small."""
  return saved_run(tmp_path_factory.mktemp("generate") / "run", seq_len=ROW)


def said(capsys, *flags):
  """What the command writes to standard output."""
  with imported("generate", *flags) as module:
    module.main()
  return capsys.readouterr().out


def without_cache(run, prompt):
  """The likeliest text to the end of a row, of the run's newest checkpoint, the whole row run again for each token."""
  found = pretrained.load(run)
  tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(found.tokenizer))
  plain = resolved(run.parent, 1, method="full")
  model = phases.build_phase(plain, small_model.mesh(1)).model
  tokens = tokenizer.encode(prompt)
  apply = jax.jit(model.apply)
  while len(tokens) < ROW:
    row = np.array([tokens + [0] * (ROW - len(tokens))])
    logits = apply({"params": found.weights}, row)[0, len(tokens) - 1, : tokenizer.get_piece_size()]
    tokens.append(int(jnp.argmax(logits)))
  return tokenizer.decode(tokens)


def test_text_with_a_cache_equals_text_without(run, capsys):
  text = said(capsys, f"--run={run}", "--prompt=the model", "--temperature=0")
  assert text == without_cache(run, "the model") + "\n"
  assert text.startswith("the model") and len(set(text)) > 12


def test_an_exported_run_says_the_same(run, tmp_path, capsys):
  export.export(run, tmp_path / "exported")
  capsys.readouterr()
  prompt = ("--prompt=the model", "--temperature=0")
  assert said(capsys, f"--model={tmp_path / 'exported'}", *prompt) == said(capsys, f"--run={run}", *prompt)


def test_the_text_is_shown_as_it_comes(run, capsys, monkeypatch):
  """When a token is drawn, what came before it has been written."""
  with imported("generate", f"--run={run}", "--prompt=the model", "--max_new_tokens=8") as module:
    generate, shown = module.generate, []

    def watched(*args, **how):
      for token in generate(*args, **how):
        shown.append(capsys.readouterr().out)
        yield token

    monkeypatch.setattr(module, "generate", watched)
    module.main()
  assert "".join(shown[:2]).startswith("the model") and sum(map(bool, shown[1:])) > 3


def test_what_stands_before_every_text_is_read_by_the_model_and_not_shown(run, capsys, monkeypatch):
  """Its end of text, for want of a BOS; neither is shown."""
  found, asked = pretrained.load(run), []
  monkeypatch.setattr(pretrained, "load", lambda path: found._replace(prefix=(1,)))
  with imported("generate", f"--run={run}", "--prompt=the model", "--max_new_tokens=2") as module:
    generate = module.generate
    monkeypatch.setattr(
      module, "generate", lambda *args, **how: generate(*args[:2], asked.append(args[2]) or args[2], **how)
    )
    module.main()
  tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(found.tokenizer))
  assert asked == [[1, *tokenizer.encode("the model")]]
  assert capsys.readouterr().out.startswith("the model")


def test_a_process_writes_the_text_and_the_origin_of_the_model(run, capsys):
  options = ("--prompt=a low é", "--max_new_tokens=9", "--top_k=5", "--top_p=0.9", "--seed=3")
  done = command("generate", f"--run={run}", *options, user_flags=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout == said(capsys, f"--run={run}", *options) and done.stdout.startswith("a low é")
  assert f"{run}, switchlora, step 0 of 12:" in done.stderr


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    ([], "expected exactly one of --run and --model, found neither"),
    (["--run=a", "--model=b"], "one of --run and --model, found both"),
    (["--run={run}"], "--prompt is missing or empty"),
    (["--run={run}", "--prompt="], "--prompt is missing or empty"),
    (["--run={run}", "--prompt=a\udcff"], "--prompt must be valid UTF-8"),
    (["--run={run}", "--prompt=a", "--temperature=-1"], r"temperature \(=-1\)"),
    (["--run={run}", "--prompt=a", "--top_k=-1"], r"top_k \(=-1\)"),
    (["--run={run}", "--prompt=a", "--top_p=2"], r"top_p \(=2\)"),
    (["--run={run}/nowhere", "--prompt=a"], "nowhere must be the directory of a run"),
    (
      ["--run={run}", "--prompt=a", f"--max_new_tokens={ROW}"],
      rf"at most {ROW} tokens.*try --max_new_tokens={ROW - 1}",
    ),
    (["--run={run}", f"--prompt={'9' * ROW}"], rf"found {ROW} \+ 1; try a shorter prompt"),
    (["--run={run}", f"--prompt={'9' * 999}", "--max_new_tokens=4"], r"found 999 \+ 4; try a shorter"),
  ],
)
def test_mistakes_are_sentences(run, flags, sentence):
  with (
    imported("generate", *(flag.format(run=run) for flag in flags)) as module,
    pytest.raises(UserError, match=sentence),
  ):
    module.main()


def test_a_prompt_that_just_fits_is_taken(run, capsys):
  text = said(capsys, f"--run={run}", f"--prompt={'9' * (ROW - 1)}", "--temperature=0")
  assert text.startswith("9" * (ROW - 1))


def test_characters_that_the_tokenizer_does_not_know_are_named(tmp_path):
  """The project's own tokenizers know all; others, T5's among them, do not."""
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["some words of a small text"] * 20),
    model_prefix=str(tmp_path / "small"),
    vocab_size=30,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  tokenizer = load_tokenizer(tmp_path / "small.model")
  with imported("generate") as module:
    assert [module.encode_prompt(tokenizer, "some text")] == tokenizer.encode(["some text"])
    with pytest.raises(UserError, match="characters outside the tokenizer's vocabulary: '☃' 'QQ'; remove them"):
      module.encode_prompt(tokenizer, "some ☃ words QQ")
    with pytest.raises(UserError, match=r"--prompt \(='  '\) has no tokens"):
      module.encode_prompt(tokenizer, "  ")
