"""MkDocs hooks: pages that are generated from the repository, so that they cannot become outdated.

* README.md is the home page; CONTRIBUTING.md and CHANGELOG.md are pages too.
* Each sub-package has an API page that lists its modules.
* A link from a page to a file of the repository outside docs/ leads to a page with the text of that file.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "switchlora_jax"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
ROOT_PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LANGUAGES = {".py": "python", ".toml": "toml", ".sbatch": "bash"}


def on_config(config):
  """Add the API pages and the pages from the root of the repository to the navigation."""
  about = next(section["About"] for section in config.nav if "About" in section)
  about += [{Path(uri).stem.capitalize(): uri} for uri in _root_pages() if uri != "index.md"]
  rooms = [{room.name: f"api/{room.name}.md"} for room in _rooms()]
  config.nav.append({"API reference": [{"Public names": "api/index.md"}, *rooms]})
  return config


def on_files(files, config):
  """Add the generated pages."""
  for uri, text in (_root_pages() | _api_pages()).items():
    files.append(File.generated(config, uri, content=text))
  pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
  for path in sorted({target for uri, text in pages.items() for target in _outside(uri, text)}):
    files.append(File.generated(config, f"source/{path}.md", content=f"# {path}\n\n{_shown(ROOT / path)}"))
  return files


def on_page_markdown(markdown, page, config, files):
  """Point the links of a page to files of the repository at the pages with their text."""
  folder = _folder(page.file.src_uri)

  def replace(link):
    path, anchor = _resolve(page.file.src_uri, link[1]), link[2] or ""
    uri = next((uri for uri, root_path in ROOT_PAGES.items() if root_path == path), None)
    if path.startswith("docs/"):
      uri = path.removeprefix("docs/")
    elif not uri and (ROOT / path).is_file():
      uri, anchor = f"source/{path}.md", ""
    return posixpath.relpath(uri, folder or ".") + anchor if uri else link[0]

  return LINK.sub(replace, markdown)


def _rooms() -> list[Path]:
  """The sub-packages of the library that have modules."""
  return sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def _root_pages() -> dict[str, str]:
  """The pages that are files in the root of the repository."""
  return {uri: (ROOT / path).read_text() for uri, path in ROOT_PAGES.items() if (ROOT / path).is_file()}


def _api_pages() -> dict[str, str]:
  """The API pages: the public names, then one page per sub-package."""
  pages = {"api/index.md": "# Public names\n\n::: switchlora_jax\n    options: {show_root_heading: false}\n"}
  for room in _rooms():
    name = f"switchlora_jax.{room.name}"
    modules = sorted(path.stem for path in room.glob("*.py") if not path.stem.startswith("_"))
    blocks = [f"::: {name}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}"]
    blocks += [f"::: {name}.{module}" for module in modules]
    pages[f"api/{room.name}.md"] = f"# {name}\n\n" + "\n\n".join(blocks) + "\n"
  return pages


def _shown(path: Path) -> str:
  """A file as Markdown: a notebook's cells without their outputs, else one code block."""
  if path.suffix != ".ipynb":
    return f"````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````\n"
  cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
  return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells)


def _folder(uri: str) -> str:
  """The folder of a page within docs/."""
  return posixpath.dirname(uri)


def _resolve(uri: str, target: str) -> str:
  """The path within the repository of the target of a link on a page."""
  base = "" if uri in ROOT_PAGES else posixpath.join("docs", _folder(uri))
  return posixpath.normpath(posixpath.join(base, target))


def _outside(uri: str, text: str) -> list[str]:
  """The files outside docs/ that a page links to and that have no page of their own."""
  paths = {_resolve(uri, target) for target, _ in LINK.findall(text)} - set(ROOT_PAGES.values())
  return [path for path in paths if not path.startswith("docs/") and (ROOT / path).is_file()]
