"""The thread that a policy runs in: it hears of faults, and names pages. What becomes of it holds nothing up."""

import contextlib
import logging
import threading
import time
from collections.abc import Sequence

from migrate.native.pager import HOLD_MAX_US, SUGGESTIONS_MAX, PagerStoppedError
from migrate.pager.policy import Fault, Policy, PolicyContext, take_runs
from migrate.session.page_flow import PageFlow

# Faults, and a queue that runs low, end the wait; else it is how often a hold is renewed.
_TICK_US = HOLD_MAX_US // 4
# One that names nothing but what is there already would be asked again at once, and for ever.
_BREATH_S = 0.001

_log = logging.getLogger(__name__)


class PolicyThread:
    """One policy beside one flow of pages. It ends with the pager, or when the policy raises; nobody waits for it.

    Args:
        flow: The pages; its pager has order SUGGESTED.
        policy_class: Made in the thread, for it is foreign code.
        pages: Length of the region.
        recorded_pages: What the policy is told of an earlier run.
        name: Of the migration, for the log.
    """

    def __init__(
        self, flow: PageFlow, policy_class: type[Policy], pages: int, recorded_pages: Sequence[int], name: str
    ) -> None:
        self._flow = flow
        self._class = policy_class
        self._pages = pages
        self._recorded_pages = recorded_pages
        self._name = name
        self._queued = 0
        self._lost = 0

    def start(self) -> None:
        """Begin. Nothing but faults is fetched before the policy has spoken, or a second is over.

        Raises:
            PagerStoppedError: the pager is stopped.
        """
        self._flow.suggest([], HOLD_MAX_US)
        threading.Thread(target=self._run, name=f"policy-{self._name}", daemon=True).start()

    def _run(self) -> None:
        try:
            policy = self._class(PolicyContext(self._pages, tuple(self._recorded_pages)))
            while True:
                self._step(policy)
        except PagerStoppedError:
            return
        except (Exception, SystemExit):  # noqa: BLE001 - foreign code
            _log.exception(
                "policy %s of migration %s is dropped; pages come in ascending order", self._class.__name__, self._name
            )
        finally:
            with contextlib.suppress(PagerStoppedError):
                self._flow.suggest([], 0)

    def _step(self, policy: Policy) -> None:
        """Let it speak, then wait until something has happened, and tell it."""
        runs = take_runs(policy, _Missing(self._flow, self._pages), SUGGESTIONS_MAX - self._queued)
        self._flow.suggest(runs, HOLD_MAX_US if policy.holds_rest else 0)
        heard = self._flow.wait_faults(_TICK_US)
        for fault in heard.faults:
            policy.on_fault(Fault(*fault))
        if not heard.faults:
            time.sleep(_BREATH_S)
        self._queued = heard.queued
        if heard.lost and not self._lost:
            _log.warning("policy %s of migration %s is too slow: it misses faults", self._class.__name__, self._name)
        self._lost += heard.lost


class _Missing:
    """The pager's bitmap, as long as there is a pager: a policy may look at it whenever it likes."""

    def __init__(self, flow: PageFlow, pages: int) -> None:
        self._flow = flow
        self.pages = pages

    def is_missing(self, page: int) -> bool:
        with self._flow.using_running() as pager:
            return pager.missing.is_missing(page)

    def next(self, from_page: int) -> int | None:
        with self._flow.using_running() as pager:
            return pager.missing.next(from_page)

    def count(self, first_page: int, count_pages: int) -> int:
        with self._flow.using_running() as pager:
            return pager.missing.count(first_page, count_pages)
