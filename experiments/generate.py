"""Continue a text with a trained model; the text is shown as it comes. Ctrl-C ends it.

python -m experiments.generate --run=runs/tiny --prompt="This function returns" --top_p=0.9
python -m experiments.generate --model=exports/tiny --prompt="This function returns" --temperature=0
"""

import contextlib
import itertools
import sys
from pathlib import Path

import jax
from absl import flags

from experiments.common import cli
from switchlora_jax.data.tokenizer import load_tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.interop import pretrained
from switchlora_jax.models import make_model
from switchlora_jax.models.generation import Sampling, generate, stream_text

RUN = flags.DEFINE_string("run", None, "directory of a run: its --workdir; its newest checkpoint is read")
MODEL = flags.DEFINE_string("model", None, "in place of --run, a Hugging Face LLaMA folder")
PROMPT = flags.DEFINE_string("prompt", None, "the text that is continued")
NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens",
  None,
  "tokens drawn at most; by default as many as a row of training has room for",
  lower_bound=1,
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "logits are divided by it; 0: always the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "draw from so many likeliest tokens; 0: from all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that together have this probability")
SEED = flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0, upper_bound=2**32 - 1)


def check() -> tuple[Path, Sampling]:
  """The folder of the model and how to draw, where the flags make sense."""
  if bool(RUN.value) == bool(MODEL.value):
    found = "both are" if RUN.value else "neither is"
    raise UserError(f"--run or --model must be given, one of them; {found}; say --run=runs/tiny")
  if not PROMPT.value:
    raise UserError('--prompt is missing or empty; give the text to be continued, say --prompt="This function"')
  if any("\ud800" <= character <= "\udfff" for character in PROMPT.value):
    raise UserError("--prompt must be text in UTF-8, and is not; write it in UTF-8")
  sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
  sampling.check()
  return Path(RUN.value or MODEL.value).expanduser(), sampling


def encode(tokenizer, prompt: str) -> list[int]:
  """The tokens of a prompt.

  Raises:
    UserError: it has none, or some that the tokenizer does not know; names these.
  """
  pieces = tokenizer.encode(prompt, return_type="proto").pieces
  if unknown := [piece.surface for piece in pieces if piece.id == tokenizer.unk_id()]:
    raise UserError(
      f"--prompt has characters that the tokenizer does not know: {' '.join(map(repr, unknown))}; leave them out"
    )
  if not pieces:
    raise UserError(f"--prompt (={prompt!r}) has nothing that the tokenizer takes for text; give some words")
  return [piece.id for piece in pieces]


def room(prompt: list[int], longest: int) -> int:
  """How many tokens to draw behind a prompt.

  Raises:
    UserError: more than the model has ever seen in a row.
  """
  left = longest - len(prompt)
  if left < (NEW_TOKENS.value or 1):
    remedy = f"--max_new_tokens={left}" if left > 0 else "a shorter prompt"
    wanted = f"{NEW_TOKENS.value or 1} new {'ones' if (NEW_TOKENS.value or 1) > 1 else 'one'}"
    raise UserError(
      f"--prompt and what follows must be at most {longest} tokens, the longest rows that the model was trained on; "
      f"found {len(prompt)} tokens and {wanted}; try {remedy}"
    )
  return NEW_TOKENS.value or left


def main():
  """Check, load, write as it comes."""
  folder, sampling = check()
  model = pretrained.load(folder)
  tokenizer = load_tokenizer(model.tokenizer)
  prompt = [*model.prefix, *encode(tokenizer, PROMPT.value)]
  new_tokens = room(prompt, model.seq_len)
  llama = make_model(model.sizes)
  variables = {"params": jax.device_put(model.weights)}
  draws = dict(pieces=tokenizer.get_piece_size(), sampling=sampling, seed=SEED.value)
  new = generate(llama, variables, prompt, new_tokens=new_tokens, end=tokenizer.eos_id(), **draws)
  print(f"{model.origin}:\n", file=sys.stderr, flush=True)
  with contextlib.suppress(KeyboardInterrupt):
    for part in stream_text(tokenizer, itertools.chain(prompt, new)):
      print(part, end="", flush=True)
  print()


if __name__ == "__main__":
  cli.run(main)
