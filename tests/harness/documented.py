"""Runs the commands that a document prints, as it prints them, and compares what they say with what it shows."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)

# Everything that the commands start, mount and configure is in namespaces that end with the first process: names of
# network namespaces and ports are nobody else's, and nothing can be left behind.
ISOLATED = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash"]
PROLOGUE = """\
set -e
mkdir -p /run/netns
mount -t tmpfs none /run/netns
ip link set lo up
"""
# After the last block: what it has left behind.
LEFTOVERS = """\
echo @left
ip netns list
for process in /proc/[0-9]*; do [ $process = /proc/1 ] || tr '\\0' ' ' <$process/cmdline; done
"""

_ID = re.compile(r"\b[0-9a-f]{12}\b")
_QUANTITY = re.compile(r"(?<![\w.])\d(?:[\d.,:-]*\d)?(?P<unit> (?:µs|ms|s|B|[KMGT]iB)\b)?")


@dataclass(frozen=True)
class Step:
    """A block of commands, and what the document shows of their output; None if it shows nothing."""

    commands: str
    shown: str | None


def steps_of(text):
    """The blocks of sh, each with the block of text that follows before the next one."""
    steps = []
    for language, body in FENCE.findall(COMMENT.sub("", text)):
        if language == "sh":
            steps.append(Step(body, None))
        elif language == "text" and steps and steps[-1].shown is None:
            steps[-1] = Step(steps[-1].commands, body)
    return steps


def run(steps, directory):
    """Run all blocks in one bash, from the root of the tree: its status, and the output of each, and what is left."""
    script = PROLOGUE + "".join(f"echo @{number}\n{step.commands}" for number, step in enumerate(steps)) + LEFTOVERS
    # The document says how `migrate` comes into the path.
    paths = [path for path in os.environ["PATH"].split(":") if path != str(ROOT / ".venv" / "bin")]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MIGRATE_", "VIRTUAL_ENV"))}
    with (directory / "stdout").open("w+") as stdout, (directory / "stderr").open("w+") as stderr:
        status = subprocess.run(
            [*ISOLATED, "-c", script],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=ROOT,
            env={**clean, "PATH": ":".join(paths), "TMPDIR": str(directory), "NO_COLOR": "1"},
            timeout=110,
        ).returncode
        stdout.seek(0)
        _, *outputs = re.split(r"^@\w+\n", stdout.read(), flags=re.MULTILINE)
    return status, outputs


def _likened(text):
    """Text in which figures are all alike, but for zero, which says something."""

    def quantity(match):
        return ("0" if not match[0].strip("0., µsmBKMGTi") else "N") + ("U" if match["unit"] else "")

    words = _ID.sub("ID", text).replace("populating", "running")
    return "\n".join(" ".join(_QUANTITY.sub(quantity, line).split()) for line in words.strip().splitlines())


def agrees(shown, printed):
    """Whether output is what a document shows of it: `…` is anything, figures are as good as others, if not zero."""
    pattern = re.escape(_likened(shown)).replace("…", ".*")
    return re.fullmatch(pattern, _likened(printed), re.DOTALL) is not None
