"""The newcomer's path: every command of README.md and docs/quickstart.md, as printed, with the output that is shown."""

import os
import re

import pytest

from tests.harness.documented import ROOT, Step, agrees, run, steps_of

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.uffd,
    pytest.mark.root,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "activate").exists(), reason="this tree has no .venv of its own"),
]
# Runs this test, so that it cannot be run here.
THE_TESTS = re.compile(r"^scripts/test\b.*\n", re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_every_command_works_and_prints_what_is_shown(name, tmp_path):
    steps = [Step(THE_TESTS.sub("", step.commands), step.shown) for step in steps_of((ROOT / name).read_text())]

    status, outputs = run(steps, tmp_path)

    said = (tmp_path / "stderr").read_text()
    assert status == 0, (
        f"{name}: block {len(outputs)} failed: {steps[len(outputs) - 1].commands}\n{outputs[-1]}\n{said}"
    )
    *outputs, left = outputs
    assert len(outputs) == len(steps)
    for step, output in zip(steps, outputs, strict=True):
        assert step.shown is None or agrees(step.shown, output), f"{name} shows\n{step.shown}\nand this came\n{output}"
    assert left == ""


def test_readme_begins_with_the_two_commands():
    first, *_ = steps_of((ROOT / "README.md").read_text())
    commands = [line.partition("#")[0].strip() for line in first.commands.splitlines()]

    assert commands == ["scripts/demo", "scripts/test"]
    assert all(os.access(ROOT / command, os.X_OK) for command in commands)
    # The one that is not run by the test above is run by whoever runs this.
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()


def test_an_output_agrees_whatever_its_figures():
    shown = "…\nstate    completed\ntotal   1.47 s, postcopy 655.0 ms\nerrors  0\n"

    assert agrees(shown, "a\nb\nstate completed\ntotal  9 ms, postcopy 1,655 µs\nerrors 0\n")
    assert not agrees(shown, "a\nb\nstate completed\ntotal  9 ms, postcopy 1,655 µs\nerrors 3\n")
    assert not agrees(shown, "a\nb\nstate failed\ntotal  9 ms, postcopy 1,655 µs\nerrors 0\n")
