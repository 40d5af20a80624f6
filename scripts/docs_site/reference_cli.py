"""The page about the command line, from the commands themselves."""

from collections.abc import Iterator
from inspect import cleandoc

import click

from migrate.cli.main import main

HEAD = """# Command line

Every command and its options, as `migrate COMMAND --help` says them.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_command(main, "migrate", None)])


def _command(command: click.Command, path: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, info_name=path.rsplit(maxsplit=1)[-1], parent=parent)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    yield f"## {path}\n\n```text\n{usage}\n```\n\n{cleandoc(command.help or '')}\n"
    # The usage names the arguments, and the text above says what they are.
    options = [item for item in command.get_params(context) if isinstance(item, click.Option)]
    records = [record for item in options if (record := item.get_help_record(context))]
    if records:
        yield "| Option | Meaning |\n|---|---|"
        yield from (f"| `{_cell(option)}` | {_cell(text)} |" for option, text in records)
        yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from _command(child, f"{path} {name}", context)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("[default:", "\\[default:")
