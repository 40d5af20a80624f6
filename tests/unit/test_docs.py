"""The documents: links lead somewhere, commands and options exist, the glossary is whole, the site has every page."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from migrate.cli.main import main
from migrate.errors import GuestHolder
from tests.harness.documented import COMMENT, FENCE

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
GLOSSARY = DOCS / "glossary.md"

SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
INVOCATION = re.compile(r"(?:^|[\s;|(])migrate (?=[-a-z])([^;|&#)]*)")
OPTION = re.compile(r"--[a-z][a-z-]*")
# Options of other programs than `migrate`, which documents name by themselves.
FOREIGN_OPTIONS = {"--thorough", "--sanitize", "--fuzz"}


def read(path):
    return COMMENT.sub("", path.read_text())


def prose(path):
    return FENCE.sub("", read(path))


def anchor_of(heading):
    """As git hosts make it, and the site."""
    words = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower())
    return words.strip().replace(" ", "-")


def name_of(path):
    return str(path.relative_to(ROOT))


each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


@each_document
def test_links_lead_somewhere(path):
    broken = []
    for target in LINK.findall(SPAN.sub("", prose(path))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in map(anchor_of, HEADING.findall(prose(there)))):
            broken.append(target)

    assert broken == []


def invocations(path):
    """What a document says to `migrate`: in code spans, and line by line in blocks of sh."""
    spans = SPAN.findall(prose(path))
    blocks = [body.replace("\\\n", " ") for language, body in FENCE.findall(read(path)) if language in ("sh", "ini")]
    for text in [*spans, *"\n".join(blocks).splitlines()]:
        for words in INVOCATION.findall(text):
            yield words.split()


def flaw_of(words):
    """Why the command line would not take them; None if it would."""
    command = main
    for position, word in enumerate(words):
        if word == "--":
            return None
        if word.startswith("-"):
            option = word.partition("=")[0].rstrip(",.")
            if option not in {name for item in command.params for name in item.opts} | {"--help", "-h"}:
                return f"`{command.name}` has no {option}"
        elif isinstance(command, click.Group) and not re.match(r"[A-Z…]", word):
            command = command.get_command(click.Context(command), word)
            if command is None:
                return f"there is no command {' '.join(words[: position + 1])}"
    return None


@each_document
def test_commands_and_their_options_exist(path):
    flaws = [flaw for words in invocations(path) if (flaw := flaw_of(words))]

    assert flaws == []


def commands(command):
    yield command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name))


@each_document
def test_options_that_stand_alone_exist(path):
    known = {name for command in commands(main) for item in command.params for name in item.opts} | FOREIGN_OPTIONS
    named = {OPTION.match(span)[0] for span in SPAN.findall(prose(path)) if OPTION.match(span)}

    assert sorted(named - known) == []


def test_an_option_that_is_not_there_is_found():
    assert flaw_of(["guest", "create", "web", "--memory", "1GiB"]) is None
    assert flaw_of(["guest", "make", "web"]) == "there is no command guest make"
    assert flaw_of(["start", "web", "--too", "x"]) == "`start` has no --too"


@each_document
def test_blocks_of_commands_parse(path):
    blocks = [body for language, body in FENCE.findall(read(path)) if language == "sh"]

    assert [
        body for body in blocks if subprocess.run(["bash", "-n"], input=body, text=True, check=False).returncode
    ] == []


# ---- the glossary ----


def terms():
    """Each word that the glossary explains, of those that share a row too, in its order."""
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|", GLOSSARY.read_text(), re.MULTILINE)
    return [row.split(", ") for row in rows]


def test_glossary_is_in_order():
    first = [row[0].lower() for row in terms()]

    assert first == sorted(first)


def words_that_users_meet():
    """Modes, roles and holders: each command and report shows them."""
    choices = {item.name: item.type for command in commands(main) for item in command.params}
    yield from choices["mode"].choices
    yield from choices["role"].choices
    yield from (holder.name.lower() for holder in (GuestHolder.SOURCE, GuestHolder.DESTINATION, GuestHolder.SPLIT))


def test_glossary_explains_what_users_meet():
    explained = {word.lower() for row in terms() for word in row}

    assert sorted(set(words_that_users_meet()) - explained) == []


def test_glossary_explains_no_word_that_nobody_uses():
    sources = [path for path in (ROOT / "migrate").rglob("*") if path.suffix in {".py", ".c", ".h"}]
    texts = "\n".join(path.read_text().lower() for path in [*DOCUMENTS, *sources] if path != GLOSSARY)
    unused = [word for row in terms() for word in row if not re.search(rf"\b{re.escape(word.lower())}", texts)]

    assert unused == []


# ---- the site ----


def hooks():
    directory = ROOT / "scripts" / "docs_site"
    sys.path.insert(0, str(directory))
    try:
        spec = importlib.util.spec_from_file_location("docs_site_hooks", directory / "hooks.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(directory))
    return module


def flat(entries):
    for entry in entries:
        if isinstance(entry, dict):
            (value,) = entry.values()
            yield from flat(value if isinstance(value, list) else [value])
        else:
            yield entry


def test_every_page_is_in_the_navigation():
    site = hooks()
    nav = list(flat(site._expand(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}

    assert set(nav) == pages | set(site.GENERATED) | set(site.ELSEWHERE.values())
    assert len(nav) == len(set(nav))
