"""Jobs that wait for one thread. Tenants take turns: of each other one's waiting jobs, one comes first. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

_Job = TypeVar("_Job")


class Turns(Generic[_Job]):
    """Jobs by number, in a queue for each tenant (Nagle, 1987: On Packet Switches with Infinite Storage).

    most: jobs of all tenants together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._queues: OrderedDict[Hashable, OrderedDict[int, _Job]] = OrderedDict()  # whose turn is next comes first
        self._tenants: dict[int, Hashable] = {}  # by the job's number

    def __len__(self) -> int:
        return len(self._tenants)

    def add(self, tenant: Hashable, number: int, job: _Job) -> _Job | None:
        """Puts a job behind its tenant's. Returns the one that there is no room for: the last of the longest queue."""
        self._queues.setdefault(tenant, OrderedDict())[number] = job
        self._tenants[number] = tenant
        if len(self) <= self._most:
            return None
        longest = max(self._queues.values(), key=len)
        return self.drop(next(reversed(longest)))

    def next(self) -> _Job | None:
        """Takes out the oldest job of the tenant whose turn it is; None where none waits."""
        if not self._queues:
            return None
        tenant, queue = next(iter(self._queues.items()))
        self._queues.move_to_end(tenant)
        return self.drop(next(iter(queue)))

    def drop(self, number: int) -> _Job | None:
        """Takes out a job; None where it does not wait."""
        if number not in self._tenants:
            return None
        tenant = self._tenants.pop(number)
        job = self._queues[tenant].pop(number)
        if not self._queues[tenant]:
            del self._queues[tenant]
        return job
