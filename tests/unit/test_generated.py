"""migrate/v1/ is what scripts/gen_proto writes from proto/."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKED_IN = ROOT / "migrate" / "v1"


def generated_files(directory):
    """Name to content of what protoc writes; the package's own __init__.py is ours."""
    return {path.name: path.read_text() for path in directory.glob("*_pb2*.py*")}


def test_generated_code_is_fresh(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "gen_proto", "--out", tmp_path],
        check=True,
        capture_output=True,
        timeout=50,
    )

    fresh = generated_files(tmp_path / "migrate" / "v1")
    checked_in = generated_files(CHECKED_IN)
    stale = sorted(name for name in fresh | checked_in if fresh.get(name) != checked_in.get(name))

    assert fresh
    assert stale == [], "run scripts/gen_proto"
