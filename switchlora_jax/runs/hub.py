"""Models of the Hugging Face hub, named `hub:NAME`, or `hub:NAME@REVISION` for a branch, a tag or a commit."""

import functools
from pathlib import Path

from switchlora_jax.errors import UserError, one_line

HUB = "hub:"  # followed by the name of a model


def folder_of(name: str, files: tuple[str, ...], flag: str, local: str) -> Path:
  """The path that a setting names; of a model of the hub, the folder into which the files are downloaded.

  Args:
    name: a path, which is not checked, or a model of the hub.
    files: patterns of the names of the files to download.
    flag: the setting, for messages.
    local: what the setting takes for a local copy, for messages.

  Raises:
    UserError: the hub cannot be reached, or the model or its revision does not exist or is not accessible.
  """
  return _download(name, files, flag, local) if name.startswith(HUB) else Path(name).expanduser()


@functools.cache
def _download(name: str, files: tuple[str, ...], flag: str, local: str) -> Path:
  """Downloads files of a model into the cache of `huggingface_hub`, unless they are there; returns their folder."""
  import huggingface_hub  # local import: it takes a while, and most runs do not use the hub

  model, at, revision = name.removeprefix(HUB).partition("@")
  if at and not revision:
    raise UserError(f"{flag} (={name!r}) must have a branch, a tag or a commit after @; add it, or leave out the @")
  try:
    return Path(huggingface_hub.snapshot_download(model, revision=revision or None, allow_patterns=list(files)))
  except Exception as error:  # network errors, and errors of invalid, missing and gated models
    raise UserError(
      f"{flag} (={name!r}) could not be downloaded: {one_line(error)}; it needs network access and the name of a "
      f"model, as in hub:openai-community/gpt2 or hub:openai-community/gpt2@main; for a local copy, pass {local}"
    ) from error
