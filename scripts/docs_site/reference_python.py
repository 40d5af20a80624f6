"""The page about the modules that other programs may import, from their docstrings."""

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from types import ModuleType

# Those that there are.
MODULES = ("migrate.client", "migrate.guest.embed", "migrate.errors")
HEAD = """# Python modules

What other programs may import, from the docstrings.
"""
# In what a default value or a type is shown as.
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
CLASS = re.compile(r"<class '([\w.]+)'>")
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields|Example|Examples):$")


def render() -> str:
    """The whole page."""
    names = [name for name in MODULES if importlib.util.find_spec(name)]
    return "\n".join([HEAD, *(line for name in names for line in _module(importlib.import_module(name)))])


def _module(module: ModuleType) -> Iterator[str]:
    yield f"## {module.__name__}\n\n{_markdown(module)}\n"
    for name, value in _public(module):
        if inspect.isclass(value):
            yield from _class(name, value)
        else:
            yield f"### {name}\n\n{_signature(name, value)}\n{_markdown(value)}\n"


def _public(module: ModuleType) -> list[tuple[str, object]]:
    """Classes and functions of ours, in the order of the sources."""
    listed = getattr(module, "__all__", None)
    own = {module.__name__, *(f"{module.__name__}.{name}" for name in vars(module))}
    return [
        (name, value)
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and (name in listed if listed is not None else not name.startswith("_") and value.__module__ in own)
        and not value.__module__.startswith("migrate.v1")
    ]


def _class(name: str, value: type) -> Iterator[str]:
    bases = [base.__name__ for base in value.__bases__ if base is not object]
    yield f"### {name}\n"
    if bases:
        yield f"Is a {', '.join(f'`{base}`' for base in bases)}.\n"
    yield _markdown(value) + "\n"
    if "__init__" in vars(value):
        yield _signature(name, value)
    for member_name, member in vars(value).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if member_name.startswith("_") or not (inspect.isfunction(function) or isinstance(function, property)):
            continue
        if isinstance(function, property):
            yield f"#### {name}.{member_name}\n\n{_markdown(function)}\n"
        else:
            yield f"#### {name}.{member_name}()\n\n{_signature(member_name, function)}\n{_markdown(function)}\n"


def _signature(name: str, value: object) -> str:
    try:
        signature = str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    readable = CLASS.sub(r"\1", ADDRESS.sub("", signature))
    return f"```python\n{name}{readable}\n```\n"


def _markdown(value: object) -> str:
    """A Google docstring: its sections become lists."""
    lines: list[str] = []
    in_section = False
    # What a class inherits is said where it comes from.
    docstring = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    for line in inspect.cleandoc(docstring or "").splitlines():
        if section := SECTION.match(line):
            lines += [f"**{section[1]}**", ""]
            in_section = True
        elif in_section and re.match(r"^ {4}\S", line):
            term, colon, rest = line.strip().partition(":")
            lines.append(f"- `{term}`:{rest}" if colon else f"- {term}")
        elif in_section and line.startswith(" "):
            lines.append(f"  {line.strip()}")
        else:
            in_section = in_section and not line
            lines.append(line)
    return "\n".join(lines)
