"""What watches a guest's RAM, in whatever process that RAM is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Userfaultfd:
    """A userfaultfd of the process that has the RAM, hands shaken, and that process's page map, until `close`.

    Attributes:
        fd: The userfaultfd.
        pagemap_fd: The page map; -1 if there is none to be had.
        close: Lets go of both, here and there; whatever was registered is unregistered already.
    """

    fd: int
    pagemap_fd: int
    close: Callable[[], None]
