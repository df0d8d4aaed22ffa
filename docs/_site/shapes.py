"""Griffe extension: doctests and indented blocks of docstrings, such as tables of shapes, become code blocks.

Markdown would join their lines into one paragraph.
"""

from itertools import groupby

import griffe


class IndentedBlocks(griffe.Extension):
  """Puts a fence around each doctest and each indented block."""

  def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
    """Rewrite the docstring of `obj`."""
    if obj.docstring:
      obj.docstring.value = fence(obj.docstring.value)


def fence(text: str) -> str:
  """The text with a fence around each doctest and each paragraph whose lines are all indented."""
  paragraphs = [list(lines) for filled, lines in groupby(text.split("\n"), bool) if filled]
  return "\n\n".join(map(_fenced, paragraphs))


def _fenced(paragraph: list[str]) -> str:
  """A paragraph, in a fence if it is a doctest or an indented block; the doctests of a section stay as they are."""
  if paragraph[0].startswith(">>>"):
    return "\n".join(["```pycon", *paragraph, "```"])
  indent = min(len(line) - len(line.lstrip()) for line in paragraph)
  if indent < 2 or paragraph[0].lstrip().startswith(">>>"):
    return "\n".join(paragraph)
  return "\n".join(["```text", *(line[indent:] for line in paragraph), "```"])
