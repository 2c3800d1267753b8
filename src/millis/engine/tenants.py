"""Fairness among tenants: whose turn it is, and who has had more than a fair share of what could be promised."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_S = 2.0  # what was asked for and granted fades with this time constant
CAPACITY_S = 20.0  # likewise for the capacity
FAIR = 0.95  # of a fair share may be taken while others are refused: what is left lets them in
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
        self._most_ms = self._most_s = 0.0  # the most that was granted to all at a time, and when

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

    def over_share(self, tenant: str, ms: float, now_s: float) -> bool:
        """Whether granting this would take from others what is fairly theirs.

        Only when another tenant was refused lately. What was granted to all is then shared out max-min fairly among
        what each has asked for (progressive filling: Bertsekas and Gallager, 1992).
        """
        lately = now_s - MEMORY_S
        if not any(name != tenant and when > lately for name, when in self._refused_s.items()):
            return False
        accounts = {name: self._faded(name, now_s) for name in list(self._accounts)}
        asked = sorted(a.asked_ms for a in accounts.values() if a.asked_ms > FORGOTTEN_MS)
        left, level = self._capacity_ms(sum(a.granted_ms for a in accounts.values()), now_s), math.inf
        for served, want in enumerate(asked):
            share = left / (len(asked) - served)
            if want > share:
                level = share
                break
            left -= want
        return accounts[tenant].granted_ms + ms > FAIR * level if tenant in accounts else False

    def forget_idle(self, active: set[str], now_s: float) -> None:
        """Drops the accounts of tenants that have nothing here any more."""
        for name in list(self._accounts):
            if name not in active and self._faded(name, now_s).asked_ms < FORGOTTEN_MS:
                del self._accounts[name]
                self._refused_s.pop(name, None)

    def _capacity_ms(self, granted_ms: float, now_s: float) -> float:
        """What can be granted to all: the most that was of late."""
        fade = math.exp((self._most_s - now_s) / CAPACITY_S)
        self._most_ms, self._most_s = max(granted_ms, self._most_ms * fade), now_s
        return self._most_ms

    def _faded(self, tenant: str, now_s: float) -> Account:
        account = self._accounts.setdefault(tenant, Account(at_s=now_s))
        if now_s > account.at_s:
            fade = math.exp((account.at_s - now_s) / MEMORY_S)
            account.asked_ms *= fade
            account.granted_ms *= fade
            account.at_s = now_s
        return account
