"""The diagrams of docs/protocol.md are drawn from the state tables as they are."""

import subprocess
import sys
from pathlib import Path


def test_diagrams_are_fresh():
    script = Path(__file__).parents[2] / "scripts" / "gen_diagrams"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
