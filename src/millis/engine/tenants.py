"""Fairness among tenants: whose turn it is, and who has had more than a fair share of what could be promised."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_S = 2.0  # what was asked for and granted fades with this time constant
FORGOTTEN_MS = 0.01  # of work asked for lately: a tenant with less is no longer there


@dataclass(slots=True)
class Account:
    """One tenant's work."""

    served: float = 0.0  # virtual time: tokens computed for it, as if it had always been there
    asked_ms: float = 0.0  # predicted, of requests with a deadline, fading
    granted_ms: float = 0.0  # likewise
    at_s: float = 0.0


class Tenants:
    """Accounts by name. Single tenants are never held back."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._refused_s: dict[str, float] = {}  # when a tenant was last refused for want of capacity

    def arrive(self, tenant: str, active: set[str]) -> None:
        """A request has come. Who was away gains nothing by it: its virtual time is that of the least served one."""
        account = self._accounts.setdefault(tenant, Account())
        if tenant not in active:
            least = min((self._accounts[name].served for name in active if name in self._accounts), default=None)
            if least is not None:
                account.served = max(account.served, least)

    def served(self, tenant: str) -> float:
        """The virtual time of a tenant; the one with the least is next."""
        account = self._accounts.get(tenant)
        return account.served if account else 0.0

    def charge(self, tenant: str, tokens: int) -> None:
        """So many were computed for a tenant."""
        self._accounts.setdefault(tenant, Account()).served += tokens

    def ask(self, tenant: str, ms: float, now_s: float) -> None:
        """A request with a deadline asks for so much work."""
        self._faded(tenant, now_s).asked_ms += ms

    def grant(self, tenant: str, ms: float, now_s: float) -> None:
        """It was admitted."""
        self._faded(tenant, now_s).granted_ms += ms

    def refuse(self, tenant: str, now_s: float) -> None:
        """It was refused for want of capacity."""
        self._refused_s[tenant] = now_s

    def over_share(self, tenant: str, now_s: float) -> bool:
        """Whether a tenant was granted more than is fairly its own, and another was refused lately.

        What was granted to all is shared out max-min fairly among what each has asked for (progressive filling:
        Bertsekas and Gallager, 1992).
        """
        lately = now_s - MEMORY_S
        if not any(name != tenant and when > lately for name, when in self._refused_s.items()):
            return False
        accounts = {name: self._faded(name, now_s) for name in list(self._accounts)}
        asked = sorted(account.asked_ms for account in accounts.values() if account.asked_ms > FORGOTTEN_MS)
        left = sum(account.granted_ms for account in accounts.values())
        for served, want in enumerate(asked):
            level = left / (len(asked) - served)
            if want > level:
                return tenant in accounts and accounts[tenant].granted_ms > level
            left -= want
        return False

    def forget_idle(self, active: set[str], now_s: float) -> None:
        """Drops the accounts of tenants that have nothing here any more."""
        for name in list(self._accounts):
            if name not in active and self._faded(name, now_s).asked_ms < FORGOTTEN_MS:
                del self._accounts[name]
                self._refused_s.pop(name, None)

    def _faded(self, tenant: str, now_s: float) -> Account:
        account = self._accounts.setdefault(tenant, Account(at_s=now_s))
        if now_s > account.at_s:
            fade = math.exp((account.at_s - now_s) / MEMORY_S)
            account.asked_ms *= fade
            account.granted_ms *= fade
            account.at_s = now_s
        return account
