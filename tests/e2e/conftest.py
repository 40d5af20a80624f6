"""Two daemons for the tests of a file, and daemons with TLS."""

import itertools

import pytest

from tests.harness.daemons import DaemonProcess, close_together, two_daemons
from tests.harness.operator import delete_everywhere
from tests.harness.tls_dirs import Certificates

_names = (f"guest-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def daemons():
    with two_daemons() as pair:
        yield pair


@pytest.fixture
def source(daemons):
    return daemons[0]


@pytest.fixture
def destination(daemons):
    return daemons[1]


@pytest.fixture
def make_guest(source, destination):
    """Makes guests at the source that have populated their RAM; none is left on either side."""
    made = []

    def make(memory_mib=64, **spec):
        name = next(_names)
        made.append(name)
        source.create(name, memory_mib=memory_mib, **spec)
        source.wait_populated(name)
        return name

    yield make
    for name in made:
        delete_everywhere(name, source, destination)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Certificates of another CA."""
    return Certificates(tmp_path_factory.mktemp("strangers") / "ca")


@pytest.fixture
def start_daemon(certificates, tmp_path):
    """Starts daemons with TLS; their logs are at `log`."""
    started = []

    def start(tls_dir=None, operator=None, **options):
        daemon = DaemonProcess(
            tls_dir=tls_dir or certificates.host(),
            operator=operator or certificates.operator(),
            log=tmp_path / f"daemon{len(started)}.log",
            **options,
        )
        started.append(daemon)
        return daemon

    yield start
    close_together(started)
