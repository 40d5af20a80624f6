"""`migrate demo` as people run it: a whole migration, the report, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEADLINE_S = 50.0
SMALL_KVM = ["--kind", "kvm", "--memory", "64MiB"]
SMALL_PROCESS = ["--kind", "process", "--memory", "64MiB"]


def start_demo(tmp_path, *arguments):
    """Start the demo with all its temporary files in tmp_path."""
    return subprocess.Popen(
        [sys.executable, "-m", "migrate", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "NO_COLOR": "1"},
    )


def leftovers(tmp_path):
    """Files in tmp_path, and processes whose command line names it."""
    found = [str(path) for path in tmp_path.iterdir()]
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(tmp_path).encode() in cmdline.read_bytes():
                found.append(str(cmdline))
        except OSError:
            continue
    return found


@pytest.mark.kvm
@pytest.mark.uffd
@pytest.mark.parametrize("verify", [False, True])
def test_demo_kvm_moves_every_page(tmp_path, verify):
    demo = start_demo(tmp_path, *SMALL_KVM, "--json", *(["--verify"] if verify else []))
    stdout, stderr = demo.communicate(timeout=DEADLINE_S)

    assert demo.returncode == 0, stderr
    report = json.loads(stdout.splitlines()[-1])
    pages = report["pages"]
    assert (report["state"], report["guest_kind"], report["guest_errors"]) == ("completed", "kvm", 0)
    assert pages["total"] == 64 << 20 >> 12
    assert pages["total"] == pages["zero"] + pages["precopy"] + pages["urgent"] + pages["background"]
    assert report["mode"] == "hybrid"
    assert pages["precopy"] > 0
    assert report["downtime_us"] > 0
    assert (report["verified_pages"] > 0) == verify
    assert leftovers(tmp_path) == []


@pytest.mark.uffd
def test_demo_process_prints_a_table(tmp_path):
    demo = start_demo(tmp_path, *SMALL_PROCESS)
    stdout, stderr = demo.communicate(timeout=DEADLINE_S)

    assert demo.returncode == 0, stderr
    assert "demo (process, 2 vCPUs, 64.0 MiB)" in stdout
    assert "\x1b" not in stdout + stderr
    assert max(len(line.rstrip()) for line in stdout.splitlines()) <= 80
    assert leftovers(tmp_path) == []


@pytest.mark.uffd
@pytest.mark.parametrize("phase", ["populating", "auditing"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_demo_signal_removes_everything(tmp_path, phase, number, status):
    # An audit that is not over before the signal comes.
    memory = "512MiB" if phase == "auditing" else "64MiB"
    demo = start_demo(tmp_path, "--kind", "process", "--memory", memory, "--json")
    try:
        while not (line := demo.stderr.readline()).startswith(phase):
            assert line, "the demo ended before that phase"
        demo.send_signal(number)
        stdout, stderr = demo.communicate(timeout=DEADLINE_S)
    finally:
        demo.kill()
        demo.wait()

    assert demo.returncode == status, stderr
    assert stdout == ""
    assert leftovers(tmp_path) == []
