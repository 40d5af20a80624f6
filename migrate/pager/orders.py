"""Which orders of the background there are on this host: those of the C core, and policies that are Python classes.

A policy is found by the name of an entry point of group `migrate.policies`: whoever installs packages here has chosen
those. `module:Class` imports whatever it names, so a daemon takes it only from its own operator, who says so when the
daemon is started, and never from a peer.
"""

import functools
import importlib
import inspect
import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migrate.config import ORDERS, check_order_word
from migrate.errors import ConfigError, UnsupportedHostError
from migrate.pager.policy import Policy

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "migrate.policies"
_OWN_PACKAGE = "migrate"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OrderSource:
    """An order that is installed on this host.

    Attributes:
        name: What it is asked for by.
        package: The installed package that it is from.
        package_version: Of that.
        entry_point: Where its class is; None if it is part of the C core.
    """

    name: str
    package: str
    package_version: str
    entry_point: "EntryPoint | None" = None

    @property
    def where(self) -> str:
        """`module:Class`, or the file of the C core."""
        return "native/order.c" if self.entry_point is None else self.entry_point.value

    def load(self) -> type[Policy] | None:
        """Its class; None for one of the C core.

        Raises:
            ConfigError: it is not to be had.
        """
        return None if self.entry_point is None else _load(self.where)

    def describe(self) -> str:
        """The first line of what it says of itself.

        Raises:
            ConfigError: it cannot be loaded.
        """
        policy = self.load()
        return ORDERS[self.name] if policy is None else (inspect.getdoc(policy) or "").partition("\n")[0]


def installed_orders() -> list[OrderSource]:
    """All orders on this host, those of the C core first. Imports none."""
    # Takes a while to load, and longer to look: a daemon that starts, or moves by an order of the C core, does neither.
    from importlib import metadata  # noqa: PLC0415

    found = {name: OrderSource(name, _OWN_PACKAGE, metadata.version(_OWN_PACKAGE)) for name in ORDERS}
    points = [
        (point.name, point.dist.name, point.dist.version, point)
        for point in metadata.entry_points(group=GROUP)
        if point.dist is not None
    ]
    for name, package, package_version, point in sorted(points, key=lambda each: (each[1] != _OWN_PACKAGE, each)):
        if name in found:
            _log.warning("package %s has an order %r, too: that of %s is taken", package, name, found[name].package)
        else:
            found[name] = OrderSource(name, package, package_version, point)
    return list(found.values())


class Orders(Collection[str]):
    """The orders that one daemon offers, by name. Which are installed is looked up once, when it first matters.

    Args:
        allowed: As `module:Class`, those that its operator has chosen. They are imported now.

    Raises:
        ConfigError: one of these is no policy.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed: dict[str, type[Policy]] = {}
        for reference in allowed:
            check_order_word(reference)
            if ":" not in reference:
                raise ConfigError(f"{reference!r} is not module:Class", remedy="what is installed needs no --policy")
            self._allowed[reference] = _load(reference)

    def __contains__(self, order: object) -> bool:
        return order in ORDERS or order in self._allowed or order in self._installed

    def __iter__(self) -> Iterator[str]:
        return iter([*self._installed, *self._allowed])

    def __len__(self) -> int:
        return len(self._installed) + len(self._allowed)

    def find(self, order: str) -> type[Policy] | None:
        """The class of a policy; None for an order of the C core.

        Raises:
            UnsupportedHostError: there is no such order, or it cannot be loaded.
        """
        if order in ORDERS:
            return None
        if order in self._allowed:
            return self._allowed[order]
        if order not in self._installed:
            raise UnsupportedHostError(f"this host has no order {order!r}")
        try:
            return self._installed[order].load()
        except ConfigError as error:
            raise UnsupportedHostError(error.message, remedy=error.remedy) from error

    @functools.cached_property
    def _installed(self) -> dict[str, OrderSource]:
        return {source.name: source for source in installed_orders()}


def _load(reference: str) -> type[Policy]:
    module_name, _, class_name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:
        # A module that is imported may raise anything.
        raise ConfigError(
            f"policy {reference} cannot be loaded: {type(error).__name__}: {error}",
            remedy="install its package for the Python of migrate, or put its directory on PYTHONPATH",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ConfigError(f"{reference} is no policy", remedy="derive the class from migrate.pager.policy.Policy")
    return found
