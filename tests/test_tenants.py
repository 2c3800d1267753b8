"""Tenants: virtual time, max-min shares, nobody held back alone."""

from __future__ import annotations

from millis.engine.tenants import MEMORY_S, Tenants


def test_who_was_served_least_is_next_and_absence_earns_nothing() -> None:
    tenants = Tenants()
    tenants.arrive("a", set())
    tenants.charge("a", 500)
    tenants.arrive("b", {"a"})
    assert tenants.served("b") == 500
    tenants.charge("b", 10)
    assert tenants.served("a") < tenants.served("b")


def busy() -> Tenants:
    """The flood has asked for 900 and got 600; the guest asked for 200 and got 50."""
    tenants = Tenants()
    for name, asked, granted in (("flood", 900, 600), ("guest", 200, 50)):
        tenants.ask(name, asked, 1.0)
        tenants.grant(name, granted, 1.0)
    return tenants


def test_more_than_a_share_is_too_much_only_while_others_are_refused() -> None:
    tenants = busy()
    assert not tenants.over_share("flood", 1.0)
    tenants.refuse("flood", 1.0)
    assert not tenants.over_share("flood", 1.0)
    tenants.refuse("guest", 1.0)
    assert tenants.over_share("flood", 1.1)
    assert not tenants.over_share("guest", 1.1)
    assert not tenants.over_share("nobody", 1.1)
    assert not tenants.over_share("flood", 1.1 + MEMORY_S)


def test_who_asks_for_little_leaves_the_rest_to_the_others() -> None:
    tenants = Tenants()
    for name, asked, granted in (("a", 900, 500), ("b", 900, 350), ("small", 20, 10)):
        tenants.ask(name, asked, 1.0)
        tenants.grant(name, granted, 1.0)
    tenants.refuse("small", 1.0)
    assert tenants.over_share("a", 1.0)  # 860 for three: 20, then 420 each
    assert not tenants.over_share("b", 1.0)


def test_what_fades_is_forgotten() -> None:
    tenants = busy()
    tenants.forget_idle({"guest"}, 100.0)
    assert tenants.served("flood") == 0
    tenants.refuse("guest", 100.0)
    assert not tenants.over_share("flood", 100.0)
