"""What doctor says of guests that are processes of somebody else's."""

import pytest

from migrate.errors import DirtyScanUnavailableError, TraceUnavailableError
from migrate.guest import probe_process
from migrate.native import dirty_scan, inject


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Makes /proc say this of Yama and of our capabilities."""

    def make(scope, capabilities):
        (tmp_path / "self").mkdir()
        (tmp_path / "self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities:016x}\n")
        if scope is not None:
            (tmp_path / "sys/kernel/yama").mkdir(parents=True)
            (tmp_path / "sys/kernel/yama/ptrace_scope").write_text(f"{scope}\n")
        monkeypatch.setattr(probe_process, "PROC", tmp_path)
        monkeypatch.setattr(inject, "check_may_trace", lambda: None)

    return make


@pytest.mark.parametrize(
    ("scope", "capabilities", "ok"),
    [
        (None, 0, True),
        (0, 0, True),
        (1, 0, False),
        (2, 0, False),
        (3, 0, False),
        (1, 1 << 19, True),
        (2, 1 << 19, True),
        (3, 1 << 19, False),
        (None, 1 << 18, True),
        (2, 1 << 18, False),
    ],
)
def test_who_may_trace(host, scope, capabilities, ok):
    host(scope, capabilities)

    check = probe_process.check_trace(required_for=("qemu",))

    assert check.ok is ok
    assert bool(check.remedy) is not ok
    assert check.required_for == ("qemu",)


def test_a_kernel_that_forbids_it_is_asked(monkeypatch):
    def refuse():
        raise TraceUnavailableError("other processes cannot be traced", remedy="allow it")

    monkeypatch.setattr(inject, "check_may_trace", refuse)

    check = probe_process.check_trace()

    assert (check.ok, check.remedy) == (False, "allow it")


def test_a_kernel_without_the_scan_says_so(monkeypatch):
    def refuse():
        raise DirtyScanUnavailableError("no dirty scan here", remedy="use another")

    monkeypatch.setattr(dirty_scan, "check_dirty_scan", refuse)

    check = probe_process.check_scan()

    assert (check.ok, check.detail, check.remedy) == (False, "no dirty scan here", "use another")


def test_the_probes_themselves_run():
    for check in (probe_process.check_trace(), probe_process.check_scan(), probe_process.check_preload()):
        assert check.detail
        assert check.ok is not bool(check.remedy)
