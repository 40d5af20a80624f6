"""Skips with their reasons, which MIGRATE_TEST_REQUIRE=kvm,uffd,tmux,root turns into failures; hypothesis profiles.

What a test has to say is said at the end, whichever process it ran in.
"""

import functools
import os
import shutil
import signal

import pytest
from hypothesis import HealthCheck, settings

from migrate.errors import UffdUnavailableError
from migrate.native.uffd import open_uffd

# What a shell starts in the background ignores SIGINT, and so would the programs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _why_no_kvm() -> str | None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    return None


def _why_no_uffd() -> str | None:
    try:
        os.close(open_uffd(user_mode_only=False))
    except UffdUnavailableError as error:
        return str(error)
    return None


def _why_not_root() -> str | None:
    return None if os.geteuid() == 0 else "not root"


def _why_no_tmux() -> str | None:
    return None if shutil.which("tmux") else "it is not installed"


_PROBES = {"kvm": _why_no_kvm, "uffd": _why_no_uffd, "tmux": _why_no_tmux, "root": _why_not_root}


def pytest_collection_modifyitems(items):
    required = set(filter(None, os.environ.get("MIGRATE_TEST_REQUIRE", "").split(",")))
    reasons = {name: probe() for name, probe in _PROBES.items()}
    for item in items:
        for name, reason in reasons.items():
            if reason is not None and item.get_closest_marker(name):
                if name in required:
                    item.add_marker(pytest.mark.usefixtures("_required_but_missing"))
                else:
                    item.add_marker(pytest.mark.skip(reason=f"{name}: {reason}"))


@pytest.fixture
def _required_but_missing():
    pytest.fail("MIGRATE_TEST_REQUIRE names what this machine lacks: " + str({n: p() for n, p in _PROBES.items()}))


_AT_THE_END = "said at the end"
_said = []


@pytest.fixture
def say_at_the_end(record_property):
    """Takes a line for whoever looks at the run."""
    return functools.partial(record_property, _AT_THE_END)


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        _said.extend(words for name, words in report.user_properties if name == _AT_THE_END)


def pytest_terminal_summary(terminalreporter):
    for words in _said:
        terminalreporter.write_line(words)
