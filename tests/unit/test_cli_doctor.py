"""`migrate doctor` and the probe behind it."""

import json
import os
import re
import subprocess
import sys

import pytest

import migrate.native
from migrate.cli import doctor as doctor_command
from migrate.errors import UffdUnavailableError
from migrate.guest import probe
from migrate.guest.probe import Check, HostCapabilities, probe_host
from migrate.guest.qemu import probe as qemu_probe
from migrate.guest.qemu.probe import check_qemu
from migrate.native import uffd
from tests.harness.cli import json_of, run
from tests.harness.tls_dirs import Certificates, valid_between

KVM_MISSING = Check("kvm-device", ok=False, detail="absent", remedy="load kvm", required_for=("kvm",))
NOTHING_WORKS = Check("memfd", ok=False, detail="refused", remedy="allow it", required_for=("kvm", "process", "qemu"))
QEMU_MISSING = Check("qemu", ok=False, detail="absent", remedy="install it", required_for=("qemu",))
JUST_A_NOTE = Check("memory", ok=False, detail="little", remedy="buy some")


def pretend(monkeypatch, *checks):
    monkeypatch.setattr(doctor_command, "probe_host", lambda: HostCapabilities(checks=checks))


def test_doctor_of_a_host_without_kvm_is_content_with_processes(monkeypatch):
    pretend(monkeypatch, KVM_MISSING, QEMU_MISSING, JUST_A_NOTE)

    result = run("doctor")

    assert result.exit_code == 0
    assert re.search(r"missing +kvm-device +absent", result.stdout)
    assert re.search(r"note +memory +little", result.stdout)
    assert "→ load kvm" in result.stdout
    assert result.stdout.splitlines()[-1] == "Guests of kind process can move here."


def test_doctor_exits_with_1_where_no_guest_can_move(monkeypatch):
    pretend(monkeypatch, NOTHING_WORKS)

    result = run("doctor")

    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "No kind of guest can move here."


def test_doctor_json(monkeypatch):
    pretend(monkeypatch, KVM_MISSING)

    assert json_of(run("doctor", "--json")) == {
        "ok": True,
        "guest_kinds": ["process", "qemu"],
        "checks": [
            {
                "name": "kvm-device",
                "ok": False,
                "detail": "absent",
                "remedy": "load kvm",
                "required_for": ["kvm"],
            }
        ],
    }


def test_doctor_json_of_an_unable_host_exits_with_1(monkeypatch):
    pretend(monkeypatch, NOTHING_WORKS)

    result = run("doctor", "--json")

    assert result.exit_code == 1
    assert json_of(result)["ok"] is False


def test_probe_of_this_host_has_a_remedy_for_every_failure():
    host = probe_host()

    names = [check.name for check in host.checks]
    assert len(names) == len(set(names))
    assert {"platform", "native-extension", "uffd-kernel-faults", "uffd-user-faults", "memfd"} <= set(names)
    assert all(check.detail for check in host.checks)
    assert all(check.remedy for check in host.checks if not check.ok)


def test_probe_leaves_no_descriptor_open():
    probe_host()
    before = sorted(os.listdir("/proc/self/fd"))

    probe_host()

    assert sorted(os.listdir("/proc/self/fd")) == before


def test_probe_without_kvm_device(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "KVM_DEVICE", tmp_path / "kvm")

    host = probe_host()

    assert not host.has_kvm
    assert "kvm" not in host.guest_kinds
    assert "No such file" in host.obstacles("kvm")[0].detail


def test_probe_of_something_that_is_not_kvm(monkeypatch, tmp_path):
    impostor = tmp_path / "kvm"
    impostor.touch()
    monkeypatch.setattr(probe, "KVM_DEVICE", impostor)

    failed = {check.name for check in probe_host().obstacles("kvm")}

    assert {"kvm-api", "kvm-capabilities"} <= failed


def test_probe_where_proc_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "PROC", tmp_path)

    checks = {check.name: check for check in probe_host().checks}

    assert not checks["memory"].ok
    assert checks["tcp-congestion-control"].detail == "unknown"


def test_probe_where_the_kernel_refuses_userfaultfd(monkeypatch):
    def refuse(*, user_mode_only):
        raise UffdUnavailableError("no userfaultfd here: Operation not permitted", remedy="run as root")

    monkeypatch.setattr(uffd, "open_uffd", refuse)

    host = probe_host()

    assert not host.has_kernel_faults
    assert host.guest_kinds == ()
    assert [check.remedy for check in host.obstacles("process")] == ["run as root"]


def test_probe_where_the_extension_is_not_built(monkeypatch):
    # None in sys.modules makes an import fail.
    monkeypatch.setitem(sys.modules, "migrate.native._native", None)
    monkeypatch.setitem(sys.modules, "migrate.native.uffd", None)
    monkeypatch.delattr(migrate.native, "_native", raising=False)

    failed = {check.name: check for check in probe_host().obstacles("process")}

    assert set(failed) == {"native-extension", "uffd-user-faults"}
    assert "pip install" in failed["native-extension"].remedy


def test_doctor_runs_where_the_extension_is_not_built():
    words = "import sys; sys.modules['migrate.native._native'] = None; from migrate.cli.main import run; run()"
    result = subprocess.run(
        [sys.executable, "-c", words, "doctor", "--json"], capture_output=True, text=True, timeout=60, check=False
    )

    assert result.returncode == 1, result.stderr
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert "pip install" in checks["native-extension"]["remedy"]


@pytest.mark.parametrize("kind", ["kvm", "process"])
def test_kinds_are_those_without_obstacles(kind):
    host = HostCapabilities(checks=(KVM_MISSING,))

    assert (kind in host.guest_kinds) == (not host.obstacles(kind))


# ---- what a daemon's user needs ----


def named(name, checks=None):
    return {check.name: check for check in checks or probe_host().checks}[name]


def test_root_is_a_note(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert (named("user").ok, named("user").required_for) == (False, ())
    assert "migrate.service" in named("user").remedy

    monkeypatch.setattr(os, "geteuid", lambda: 990)
    assert named("user").ok


@pytest.mark.parametrize(
    ("pattern", "detail", "has_remedy"),
    [
        ("core", "core", False),
        ("|/usr/lib/systemd-coredump %P", "systemd-coredump", True),
        ("", "unknown", False),
    ],
)
def test_core_pattern(monkeypatch, tmp_path, pattern, detail, has_remedy):
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/core_pattern").write_text(pattern + "\n")
    monkeypatch.setattr(probe, "PROC", tmp_path)

    check = named("core-pattern")

    assert detail in check.detail
    assert bool(check.remedy) == has_remedy


def closed_device(monkeypatch, tmp_path, attribute):
    device = tmp_path / "device"
    device.touch()
    monkeypatch.setattr(probe, attribute, device)
    real = os.open

    def refuse(path, *args, **kwargs):
        if path == device:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    return device


@pytest.mark.parametrize(("attribute", "name"), [("KVM_DEVICE", "kvm-device"), ("UFFD_DEVICE", "uffd-device")])
def test_closed_device_says_how_to_open_it(monkeypatch, tmp_path, attribute, name):
    device = closed_device(monkeypatch, tmp_path, attribute)
    device.chmod(0o600)

    check = named(name)

    assert not check.ok
    assert "99-migrate.rules" in check.remedy


@pytest.mark.root
def test_closed_device_names_the_group_that_has_it(monkeypatch, tmp_path):
    device = closed_device(monkeypatch, tmp_path, "UFFD_DEVICE")
    os.chown(device, 0, 65534)
    device.chmod(0o660)

    assert "add this user to group nogroup" in named("uffd-device").remedy


def test_state_dir(tmp_path):
    state = tmp_path / "state"
    assert "the daemon makes it" in run("doctor", "--state-dir", str(state)).stdout
    state.mkdir(mode=0o700)
    assert run("doctor", "--state-dir", str(state)).exit_code == run("doctor").exit_code

    state.chmod(0o755)
    result = run("doctor", "--state-dir", str(state), "--json")

    assert result.exit_code == 1
    found = {check["name"]: check for check in json_of(result)["checks"]}["state-dir"]
    assert (found["ok"], "open to others" in found["detail"]) == (False, True)
    assert "chmod 700" in found["remedy"]


def test_tls_dir(tmp_path):
    certificates = Certificates(tmp_path / "ca")
    good = certificates.host()
    old = certificates.host("old", validity=valid_between(-100, 10))

    def checks_of(directory):
        found = json_of(run("doctor", "--tls-dir", str(directory), "--json"))["checks"]
        return {check["name"]: check for check in found}

    assert checks_of(good)["tls-dir"]["ok"]
    assert checks_of(good)["tls-expiry"]["ok"]
    assert not checks_of(old)["tls-expiry"]["ok"]
    assert "takes no restart" in checks_of(old)["tls-expiry"]["remedy"]
    (good / "key.pem").chmod(0o644)
    assert not checks_of(good)["tls-dir"]["ok"]
    assert run("doctor", "--tls-dir", str(good)).exit_code == 1


def test_doctor_names_all_kinds(monkeypatch):
    pretend(monkeypatch, JUST_A_NOTE)

    assert run("doctor").stdout.splitlines()[-1] == "Guests of kind kvm, process and qemu can move here."


@pytest.mark.parametrize(
    ("program", "ok", "words"),
    [
        ("#!/bin/sh\necho QEMU emulator version 8.2.1", True, "version 8.2.1"),
        ("#!/bin/sh\necho QEMU emulator version 4.2.0", False, "use QEMU 5.0 or newer"),
        ("#!/bin/sh\necho hello", False, "use QEMU 5.0 or newer"),
        ("#!/bin/sh\nexit 1", False, "does not run"),
        (None, False, "Debian: qemu-system-x86"),
    ],
)
def test_qemu_is_there_and_new_enough(monkeypatch, tmp_path, program, ok, words):
    path = tmp_path / "qemu"
    if program is not None:
        path.write_text(program)
        path.chmod(0o755)
    monkeypatch.setenv("MIGRATE_QEMU", str(path))

    (check,) = (each for each in check_qemu() if each.name == "qemu")

    assert check.ok == ok
    assert words in check.detail + check.remedy
    assert check.required_for == ("qemu",)


def test_qemu_needs_ptrace_or_the_preload_library(monkeypatch):
    def lacks(name):
        return lambda: Check(name, ok=False, detail="absent", remedy="have it")

    monkeypatch.setattr(qemu_probe, "check_trace", lacks("ptrace"))
    assert all(check.required_for != ("qemu",) for check in check_qemu() if check.name == "ptrace")

    monkeypatch.setattr(qemu_probe, "check_preload", lacks("preload-library"))
    required = {check.name for check in check_qemu() if "qemu" in check.required_for and not check.ok}
    assert required == {"ptrace", "preload-library"}
