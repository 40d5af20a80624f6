"""What holds for every file of the tree: its size, and that it knows no machine."""

import re
import subprocess
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES_MAX = 500
SIZED_SUFFIXES = {".py", ".c", ".h"}
# Paths under which people keep checkouts and homes.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|work|workspace|mnt|srv)/[A-Za-z0-9_.-]+/")


def tree_files():
    """Files under version control, or about to be; nothing where there is no repository."""
    if not (ROOT / ".git").exists():
        return []
    listing = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def read(path):
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


@pytest.fixture(scope="module")
def files():
    found = tree_files()
    if not found:
        pytest.skip("not a git checkout")
    return found


def test_no_file_contains_the_path_of_a_checkout(files):
    machine_paths = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(read(path).splitlines(), 1)
        if MACHINE_PATH.search(line) or f"{ROOT}/" in line
    ]

    assert machine_paths == []


def test_files_stay_small(files):
    oversized = {
        str(path.relative_to(ROOT)): count
        for path in files
        if path.suffix in SIZED_SUFFIXES
        and "v1" not in path.parts
        and (count := len(read(path).splitlines())) > LINES_MAX
    }

    # A file that grows is a reason to think, not to fail.
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for name, count in oversized.items():
            warnings.warn(f"{name} has {count} lines: is it still one concept?", stacklevel=1)


def shell_scripts():
    candidates = [path for path in sorted((ROOT / "scripts").iterdir()) if path.is_file()]
    return [path for path in [*candidates, ROOT / ".ci" / "run"] if "bash" in read(path).partition("\n\n")[0]]


@pytest.mark.parametrize("path", shell_scripts(), ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True, timeout=30)
