"""Counting is no news: it waits, and is told in the end."""

from __future__ import annotations

from snapshotd.core.news import COUNTERS_S, News
from snapshotd.metadata import SlotCounters, SlotFacts


def facts(sent: int, address: str = "h:1") -> SlotFacts:
    return SlotFacts(0, address, counters=SlotCounters(bytes_sent=sent))


def test_news_is_told_at_once_and_once() -> None:
    news = News()
    assert news.to_tell(facts(0), 10.0)
    assert not news.to_tell(facts(0), 10.0)
    assert news.to_tell(facts(5, "h:2"), 10.0)
    assert news.due_s is None


def test_counting_waits_and_is_told() -> None:
    news = News()
    news.to_tell(facts(0), 10.0)
    told = [now for now in range(1000) if news.to_tell(facts(now + 1), 10.0 + now / 1000)]
    assert told == []
    assert news.due_s == 10.0 + COUNTERS_S
    assert news.to_tell(facts(1001), news.due_s)
    assert news.due_s is None


def test_what_was_told_beside_news_is_not_told_again() -> None:
    news = News()
    news.to_tell(facts(0), 10.0)
    assert not news.to_tell(facts(1), 10.1)
    assert news.to_tell(facts(1, "h:2"), 10.2)
    assert not news.to_tell(facts(1, "h:2"), 20.0)
    assert news.due_s is None
