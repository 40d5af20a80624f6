"""A daemon that peers reach through bad networks of our own."""

from tests.harness.daemons import DaemonProcess
from tests.harness.fault_proxy import FaultProxy

# Nothing listens there.
_NOWHERE = "127.0.0.1:1"


class ProxiedDaemon(DaemonProcess):
    """A daemon with a proxy before each port, whose addresses it tells its peers. We ourselves call it directly.

    Attributes:
        control_link: Carries control calls, and the pages of transport grpcio.
        page_link: Carries the pages of transport native.
    """

    def __init__(self, *, options=(), chooser=None, **others):
        # Where they lead is known once the daemon is there, which must know their addresses first.
        self.control_link, self.page_link = FaultProxy(_NOWHERE, chooser), FaultProxy(_NOWHERE, chooser)
        advertised = ["--advertise", self.control_link.address, "--advertise-pages", self.page_link.address]
        try:
            super().__init__(options=[*options, *advertised], **others)
        except BaseException:
            self._close_links()
            raise

    def _start(self, listen, page_listen):
        super()._start(listen, page_listen)
        self.control_link.retarget(self.address)
        self.page_link.retarget(self.page_address)

    @property
    def advertised(self):
        return self.control_link.address

    def calm(self):
        """Both links are good ones."""
        self.control_link.calm()
        self.page_link.calm()

    def close(self):
        try:
            super().close()
        finally:
            self._close_links()

    def _close_links(self):
        self.control_link.close()
        self.page_link.close()
