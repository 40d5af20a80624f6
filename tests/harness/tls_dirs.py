"""TLS directories of every kind, as `migrate tls` makes them, for tests."""

from datetime import UTC, datetime, timedelta

from migrate.authority import Authority, Validity
from migrate.tls import Role

LOOPBACK = ("127.0.0.1", "localhost")


def valid_between(begin_days, end_days):
    """From and until so many days from now."""
    now = datetime.now(UTC)
    return Validity(now + timedelta(days=begin_days), now + timedelta(days=end_days))


class Certificates:
    """A CA, and TLS directories that it issues, each once."""

    def __init__(self, path):
        self.authority = Authority.create(path)
        self._made = {}

    def issue(self, name, role, addresses=(), **options):
        if name not in self._made:
            self._made[name] = self.authority.issue(name, role, addresses, **options)
        return self._made[name]

    def host(self, name="host", addresses=LOOPBACK, **options):
        return self.issue(name, Role.HOST, addresses, **options)

    def operator(self, name="operator", **options):
        return self.issue(name, Role.OPERATOR, **options)

    def viewer(self, name="viewer", **options):
        return self.issue(name, Role.VIEWER, **options)

    def renew(self, name, role, addresses=(), **options):
        return self.authority.issue(name, role, addresses, renew=True, **options)
