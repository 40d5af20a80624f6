"""A migration's record, and with it what is written down: the one is shown, the other outlives the daemon."""

import logging

from migrate.errors import MigrateError, StateDirError
from migrate.session.ports import Journal
from migrate.session.record import MigrationRecord
from migrate.session.states import Event
from migrate.v1 import daemon_state_pb2 as saved

_log = logging.getLogger(__name__)


class Ledger:
    """What is shown and what is written of one migration on one side.

    Args:
        record: What is shown; its lock guards both.
        entry: What is written; changed by the session, under the lock.
        journal: Where.
    """

    def __init__(self, record: MigrationRecord, entry: saved.SavedMigration, journal: Journal) -> None:
        self.record = record
        self.entry = entry
        self._journal = journal

    def save(self) -> None:
        """Write down what is in the entry now.

        Raises:
            StateDirError: it could not be written; what was there before still is.
        """
        with self.record.lock:
            self._journal.save(self.entry)

    def end(self, event: Event, error: MigrateError | None = None) -> None:
        """Take a last step. It is written down before it is shown: nobody sees an end that a restart undoes.

        Raises:
            LocalProtocolError: the event is not allowed now.
            StateDirError: it could not be written; nothing was changed.
        """
        with self.record.lock:
            self.entry.final.CopyFrom(self.record.foresee(event, error))
            self._drop_recorded_pages()
            try:
                self._journal.save(self.entry)
            except StateDirError:
                self.entry.ClearField("final")
                raise
            self.record.on(event, error)

    def _drop_recorded_pages(self) -> None:
        """They may be many, and no order goes by them any more."""
        if self.entry.HasField("source"):
            self.entry.source.request.ClearField("recorded_pages")
        if self.entry.HasField("destination"):
            self.entry.destination.ClearField("recorded_pages")

    def end_anyhow(self, event: Event, error: MigrateError | None = None) -> None:
        """Take a last step that has happened already, whether or not it can be written down.

        If it cannot, a restart finds the guests as they are, and comes to the same end by itself.

        Raises:
            LocalProtocolError: the event is not allowed now.
        """
        try:
            self.end(event, error)
        except StateDirError as failure:
            _log.warning("the end of migration %s was not written down: %s", self.record.migration_id, failure)
            self.record.on(event, error)
