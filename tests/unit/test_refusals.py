"""A refused restore keeps its kind on the wire, and becomes the error that fits it."""

from __future__ import annotations

import pytest

from snapshotd.errors import RequestError
from snapshotd.metadata import Decision, DecisionId, Group, Home, Member, RefusalKind
from snapshotd.rpc.convert import decision_from, decision_to
from snapshotd_client import CannotProtect, Refused, SnapshotLost, WorldChanged
from snapshotd_client.asking import refusal_of


def refused(kind: RefusalKind | None) -> Decision:
    made = DecisionId(3, "a")
    return Decision(made, "job", 1, (), ("t0",), refusal="it is so", refusal_kind=kind)


@pytest.mark.parametrize("kind", list(RefusalKind))
def test_the_kind_survives_the_wire(kind: RefusalKind) -> None:
    assert decision_from(decision_to(refused(kind))) == refused(kind)


def test_other_outcomes_have_no_kind() -> None:
    alone = Group((Member(0, Home("a", 0)),), 0)
    fresh = Decision(DecisionId(3, "a"), "job", 1, (alone,), ("t0",))
    assert decision_from(decision_to(fresh)) == fresh


def test_a_record_without_a_kind_is_a_loss_and_an_unknown_kind_is_refused() -> None:
    message = decision_to(refused(RefusalKind.OTHER_WORLD))
    message.ClearField("refusal_kind")
    assert decision_from(message).refusal_kind is RefusalKind.LOST
    message.refusal_kind = 77
    with pytest.raises(RequestError, match="unknown kind 77"):
        decision_from(message)


@pytest.mark.parametrize(
    ("kind", "error", "code", "fresh_helps"),
    [
        (RefusalKind.LOST, SnapshotLost, "lost", True),
        (RefusalKind.CANNOT_PROTECT, CannotProtect, "cannot-protect", False),
        (RefusalKind.OTHER_WORLD, WorldChanged, "other-world", True),
        (None, SnapshotLost, "lost", True),
    ],
)
def test_each_kind_has_its_error_and_remedy(
    kind: RefusalKind | None, error: type[Refused], code: str, fresh_helps: bool
) -> None:
    raised = refusal_of(decision_to(refused(kind)))
    assert type(raised) is error
    assert raised.code == code
    assert raised.what == "it is so"
    assert raised.remedy
    assert ('on_lost="fresh"' in raised.remedy) is fresh_helps
