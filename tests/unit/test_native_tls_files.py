"""The files of TLS: a bad one is told by its name, and changes nothing; a good one is used from then on."""

import threading

import pytest

from migrate.config import Endpoint
from migrate.errors import ConfigError, PeerNotTrustedError
from migrate.native.exports import Exports
from migrate.native.fetcher import NativeFetch
from migrate.native.pageserver import PageServer
from migrate.native.tls import NativeTls
from tests.harness.certificates import FUTURE, PAST, Authority
from tests.harness.destination import PAGES, Destination, failure_of
from tests.harness.memory import PAGE, ServedMemory
from tests.harness.waiting import wait_until

GARBAGE = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
def host(authority):
    return authority.issue()


def peers_of(tmp_path, *contents):
    made = tmp_path / "peers"
    made.mkdir()
    for number, content in enumerate(contents):
        (made / f"{number}.pem").write_text(content)
    return made


# ---- what cannot be loaded ----


@pytest.mark.parametrize("which", ["ca", "cert", "key"])
@pytest.mark.parametrize("content", [None, "", "nonsense\n", GARBAGE], ids=["missing", "empty", "nonsense", "garbage"])
def test_bad_file_is_named(host, which, content):
    path = getattr(host, which)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        host.native()
    assert caught.value.message.startswith(f"{path}: ")
    assert len(caught.value.message) > len(f"{path}: ")
    assert (content is not None) or "No such file" in caught.value.message


@pytest.mark.parametrize("which", ["ca", "cert", "key"])
def test_directory_in_place_of_a_file_is_named(host, which):
    path = getattr(host, which)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=str(path)):
        host.native()


def test_key_of_another_certificate_is_refused(authority, host):
    host.key.write_bytes(authority.issue("other").key.read_bytes())
    with pytest.raises(ConfigError, match=f"{host.key}: key values mismatch"):
        host.native()


def test_key_with_a_passphrase_is_refused_without_asking_for_it(authority):
    locked = authority.issue("locked", password=b"secret")
    with pytest.raises(ConfigError, match=f"{locked.key}: the key must have no passphrase"):
        locked.native()


@pytest.mark.parametrize(("valid", "words"), [(PAST, "has expired"), (FUTURE, "is not yet valid")])
def test_own_certificate_must_be_valid_now(authority, valid, words):
    late = authority.issue("late", valid=valid)
    with pytest.raises(ConfigError, match=f"{late.cert}: certificate {words}"):
        late.native()


def test_list_of_peers_must_be_a_directory(host, tmp_path):
    (tmp_path / "peers").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path / 'peers'}: Not a directory"):
        host.native(tmp_path / "peers")


@pytest.mark.parametrize("content", ["", "nonsense", GARBAGE], ids=["empty", "nonsense", "garbage"])
def test_bad_file_in_the_list_of_peers_is_named(host, tmp_path, content):
    peers = peers_of(tmp_path, host.cert.read_text(), content)
    with pytest.raises(ConfigError, match=str(peers / "1.pem")):
        host.native(peers)


def test_bad_end_of_a_file_in_the_list_of_peers_is_named(host, tmp_path):
    peers = peers_of(tmp_path, host.cert.read_text() + GARBAGE)
    with pytest.raises(ConfigError, match=str(peers / "0.pem")):
        host.native(peers)


def test_closing_twice_is_closing_once(host):
    made = host.native()
    made.close()
    made.close()


def test_nothing_is_served_or_fetched_with_what_was_closed(host):
    """Least of all in plain text."""
    made = host.native()
    made.close()
    with pytest.raises(ConfigError, match="closed"):
        made.reload()
    exports = Exports()
    with pytest.raises(ConfigError, match="closed"):
        PageServer(Endpoint("127.0.0.1", 0), exports, made)
    with pytest.raises(ConfigError, match="closed"):
        NativeFetch("127.0.0.1", 1, "m", "t", tls=made)


# ---- what is loaded again ----


class Pair:
    """Both ends of the page call, as one host each."""

    def __init__(self, authority, fill_pages=PAGES):
        self.source, self.destination = authority.issue("source"), authority.issue("destination")
        self.server_tls, self.client_tls = self.source.native(), self.destination.native()
        self.served = ServedMemory(fill_pages, tls=self.server_tls)

    def check_fetches(self):
        destination = Destination(PAGES)
        try:
            destination.start(self.served.endpoint, tls=self.client_tls)
            destination.wait()
            destination.check_all(self.served.memory)
        finally:
            destination.close()

    def failure(self):
        destination = Destination(PAGES)
        try:
            return failure_of(destination, self.served.endpoint, tls=self.client_tls)
        finally:
            destination.close()

    def close(self):
        self.served.close()
        self.server_tls.close()
        self.client_tls.close()


@pytest.fixture
def pair(authority):
    made = Pair(authority)
    yield made
    made.close()


def begin_fetch(pair, destination):
    """A fetch that takes three seconds."""
    cap_bytes_per_s = PAGES * PAGE // 3
    fetch = destination.start(pair.served.endpoint, tls=pair.client_tls, max_bandwidth_bytes_per_s=cap_bytes_per_s)
    destination.touch(7)
    destination.check_touched(pair.served.memory, 1)
    return fetch


def check_completes(pair, destination):
    destination.touch(200)
    destination.check_touched(pair.served.memory, 1)
    destination.wait()
    destination.check_all(pair.served.memory)


@pytest.mark.uffd
def test_certificates_are_replaced_while_a_fetch_runs(pair, authority, destination):
    """The old connection goes on."""
    fetch = begin_fetch(pair, destination)
    for old, tls in ((pair.source, pair.server_tls), (pair.destination, pair.client_tls)):
        old.become(authority.issue(f"new-{old.cert.stem}"))
        tls.reload()
    pair.check_fetches()
    check_completes(pair, destination)
    assert fetch.counters().reconnects == 0


@pytest.mark.uffd
def test_authority_is_replaced_while_a_fetch_runs(pair, destination, tmp_path):
    """The old connection ends, the fetch goes on over another."""
    fetch = begin_fetch(pair, destination)
    new = Authority(tmp_path / "new")
    pair.source.become(new.issue("source"))
    pair.server_tls.reload()
    error = pair.failure()  # the client still trusts, and is, the old one
    assert type(error) is PeerNotTrustedError
    assert "signed by an unknown authority" in error.message
    pair.destination.become(new.issue("destination"))
    pair.client_tls.reload()
    pair.check_fetches()
    check_completes(pair, destination)
    assert fetch.counters().reconnects


@pytest.mark.uffd
@pytest.mark.parametrize("which", ["ca", "cert", "key"])
def test_bad_file_changes_nothing_when_it_is_loaded_again(pair, which):
    path = getattr(pair.source, which)
    before = path.read_bytes()
    path.write_bytes(before[:-60])
    for _ in range(2):
        with pytest.raises(ConfigError, match=str(path)):
            pair.server_tls.reload()
    pair.check_fetches()
    path.write_bytes(before)
    pair.server_tls.reload()
    pair.check_fetches()


@pytest.mark.uffd
def test_half_of_a_replacement_changes_nothing(pair, authority):
    pair.source.cert.write_bytes(authority.issue("source-2").cert.read_bytes())
    with pytest.raises(ConfigError, match="key values mismatch"):
        pair.server_tls.reload()
    pair.check_fetches()


@pytest.mark.uffd
def test_two_authorities_are_trusted_while_one_replaces_the_other(pair, tmp_path):
    new = Authority(tmp_path / "new")
    pair.source.ca.write_bytes(pair.source.ca.read_bytes() + new.ca.read_bytes())
    pair.server_tls.reload()
    pair.check_fetches()
    old_ca = pair.destination.ca.read_bytes()
    pair.destination.become(new.issue("destination"))
    pair.destination.ca.write_bytes(old_ca)
    pair.client_tls.reload()
    pair.check_fetches()


@pytest.mark.uffd
def test_what_was_closed_serves_on_where_it_is_used(authority):
    pair = Pair(authority)
    try:
        pair.server_tls.close()
        pair.check_fetches()
    finally:
        pair.close()


@pytest.mark.uffd
def test_loading_again_and_again_disturbs_no_handshake(pair):
    done = threading.Event()

    def reload():
        while not done.is_set():
            pair.server_tls.reload()
            pair.client_tls.reload()

    thread = threading.Thread(target=reload)
    thread.start()
    try:
        for _ in range(8):
            pair.check_fetches()
    finally:
        done.set()
        thread.join()
    wait_until(lambda: pair.served.server.counters().connections_now == 0, 10, "every connection to end")
    assert pair.served.server.counters().handshakes_failed == 0


def test_paths_may_hold_any_character(authority, tmp_path):
    odd = tmp_path / "é % \udcff"
    odd.mkdir()
    host = authority.issue()
    paths = [odd / path.name for path in (host.ca, host.cert, host.key)]
    for path, original in zip(paths, (host.ca, host.cert, host.key), strict=True):
        path.write_bytes(original.read_bytes())
    NativeTls(*paths).close()
