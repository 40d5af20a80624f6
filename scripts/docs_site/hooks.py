"""What mkdocs does on top of docs/: pages from elsewhere, generated pages, links out of docs/, diagrams as SVG.

The pages in docs/ link to each other and to files of the tree as a plain git host needs it. In the site, a link to a
page goes to that page, and a link to another file goes to a copy of it.
"""

import posixpath
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import mmdr
import reference_cli
import reference_proto
import reference_python
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Pages whose source is not in docs/.
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
GENERATED: dict[str, Callable[[], str]] = {
    "reference/cli.md": reference_cli.render,
    "reference/proto.md": reference_proto.render,
    "reference/python.md": reference_python.render,
}
PROTO_DIR = "proto/migrate/v1"

CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# What a browser would fetch by itself.
LOADED = re.compile(r"<(?:script|img|iframe|source)[^>]+src=\"?(?:https?:)?//|<link[^>]+href=\"?(?:https?:)?//")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Expand directories of the navigation."""
    config.nav = _expand(config.nav or [])
    return config


def _expand(entries: list[Any]) -> list[Any]:
    expanded: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            expanded.append({title: _expand(value) if isinstance(value, list) else value})
        elif entry.endswith("/"):
            expanded += sorted(f"{entry}{path.name}" for path in (DOCS / entry).glob("*.md"))
        else:
            expanded.append(entry)
    return expanded


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put in place of each page what the site shows of it."""
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    pages |= {uri: (ROOT / source).read_text() for source, uri in ELSEWHERE.items()}
    pages |= {uri: render() for uri, render in GENERATED.items()}
    assets: dict[str, str] = {}
    for uri, text in pages.items():
        _replace(files, config, uri, _rewrite_links(_draw(text, uri, assets), uri, assets))
    for uri, content in assets.items():
        _replace(files, config, uri, content)
    return files


def _replace(files: Files, config: MkDocsConfig, uri: str, content: str) -> None:
    before = files.get_file_from_path(uri)
    if before is not None:
        files.remove(before)
    files.append(File.generated(config, uri, content=content))


def _draw(text: str, uri: str, assets: dict[str, str]) -> str:
    """Mermaid in, images out: nobody's browser needs a library for them."""

    def image(match: re.Match[str]) -> str:
        source = match[1]
        drawn = f"diagrams/{sha256(source.encode()).hexdigest()[:16]}.svg"
        if drawn not in assets:
            # Its lines are dark, and a page may be, too.
            assets[drawn] = mmdr.render(source).svg().replace('style="', 'style="background:white;', 1)
        return f"![{source.split()[0]}]({posixpath.relpath(drawn, posixpath.dirname(uri) or '.')})"

    return DIAGRAM.sub(image, text)


def _rewrite_links(text: str, uri: str, assets: dict[str, str]) -> str:
    sources = {page: source for source, page in ELSEWHERE.items()}
    base = posixpath.dirname(sources.get(uri, f"docs/{uri}"))

    def link(match: re.Match[str]) -> str:
        path, hash_mark, anchor = match[1].partition("#")
        if not path or ":" in path:
            return match[0]
        target = _in_site(posixpath.normpath(posixpath.join(base, path)), assets)
        if target is None:
            return match[0]
        target, _, own_anchor = target.partition("#")
        fragment = f"#{own_anchor}" if own_anchor else hash_mark + anchor
        return f"]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{fragment})"

    parts = CODE.split(text)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def _in_site(path: str, assets: dict[str, str]) -> str | None:
    """Where the site has a file of the tree; None if there is no such file."""
    here = ROOT / path
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path == PROTO_DIR or path.startswith(f"{PROTO_DIR}/"):
        return "reference/proto.md" + (f"#{here.name.replace('.', '')}" if here.is_file() else "")
    if path.startswith("docs/"):
        page = f"{path}/README.md" if here.is_dir() else path
        return page.removeprefix("docs/") if (ROOT / page).exists() else None
    if not here.is_file():
        return None
    # A browser shows a text, and would offer to save a program.
    copy = f"source/{path}.txt"
    assets[copy] = here.read_text()
    return copy


def on_post_page(output: str, page: Any, config: MkDocsConfig) -> str:  # noqa: ARG001 - mkdocs names them
    """Refuse a page that loads something from another host."""
    loaded = LOADED.search(output)
    if loaded:
        raise PluginError(f"{page.file.src_uri} loads something from another host: {loaded[0]}")
    return output
