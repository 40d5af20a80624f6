"""Imports go down the house, never up; the rules of the protocol import no machinery."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "migrate"

# Top to bottom. A module imports from its own layer and from those below it.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"daemon"},
    {"session"},
    {"pager"},
    {"pageserver"},
    {"guest"},
    {"telemetry"},
    {"native"},
    {"client"},
    {
        "model",
        "units",
        "errors",
        "error_info",
        "config",
        "files",
        "barriers",
        "tls",
        "authority",
        "channels",
        "handshake",
        "__init__",
    },
    {"v1"},
]
# The tables and rules of a migration are tested as pure Python.
PURE_MODULES = ["session/states.py", "session/rules.py"]
IMPURE_IMPORTS = {"grpc", "socket", "time", "asyncio", "threading", "os"}
IMPURE_LAYERS = {"native", "guest", "pager", "pageserver", "daemon", "cli", "telemetry"}


def layer_of(name):
    """Number of the layer that holds migrate.<name>, 0 at the top."""
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"migrate.{name} stands in no layer: add it to LAYERS"
    return found[0]


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "build.py"]


def imported_names(path):
    """Dotted names that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports out from `migrate`"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_name(path):
    """`cli` for migrate/cli/main.py, `units` for migrate/units.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own_layer = layer_of(top_name(path))

    upward = [
        name
        for name in imported_names(path)
        if name.startswith("migrate.") and layer_of(name.split(".")[1]) < own_layer
    ]

    assert upward == []


@pytest.mark.parametrize("module", [name for name in PURE_MODULES if (PACKAGE / name).exists()])
def test_rules_import_no_machinery(module):
    names = list(imported_names(PACKAGE / module))

    impure = [name for name in names if name.split(".")[0] in IMPURE_IMPORTS]
    impure += [name for name in names if name.startswith("migrate.") and name.split(".")[1] in IMPURE_LAYERS]

    assert impure == []


def needs(module, *heavy):
    """Whether importing a module imports one of those."""
    words = f"import sys, {module}; sys.exit(any(name.startswith({heavy!r}) for name in sys.modules))"
    return subprocess.run([sys.executable, "-c", words], cwd=ROOT, timeout=30, check=False).returncode != 0


def test_the_client_needs_no_c():
    """A program that only operates daemons runs where nothing is compiled."""
    assert not needs("migrate.client", "migrate.native")


@pytest.mark.parametrize("module", ["migrate.telemetry.trace_file", "migrate.telemetry.report", "migrate.pager.replay"])
def test_a_trace_needs_no_c(module):
    """It is written, and looked at, where a client runs."""
    assert not needs(module, "migrate.native")


def test_the_command_line_starts_without_what_only_some_commands_need():
    """`migrate doctor` is for hosts where things are missing, and nobody likes to wait for `migrate --help`."""
    assert not needs("migrate.cli.main", "migrate.native", "numpy", "pyarrow")
    assert not needs("migrate.cli.main", "grpc", "rich")
