"""The package of somebody else in tests/third_party_policy/, installed as its users would install it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "third_party_policy"


def install(directory):
    """Install it below a directory, from a copy, with what is here; the variables by which Python finds it there."""
    source, target = directory / "source", directory / "site"
    shutil.copytree(PACKAGE, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)],
        check=True,
        timeout=50,
    )
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{target}{os.pathsep}{path}" if path else str(target)}
