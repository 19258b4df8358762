"""Whatever gets lost, overtakes or starts anew: what is understood of a node is what it said."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.errors import RequestError
from snapshotd.metadata import NodeFacts
from snapshotd.rpc.facts import node_from, node_to
from snapshotd.rpc.telling import KEPT, Tellings
from snapshotd.wire.v1 import node_pb2 as pb
from tests.fuzz import likely


def sound(facts: NodeFacts) -> bool:
    """Whether a daemon could say that of itself."""
    try:
        return node_from(node_to(facts)) == facts
    except RequestError:
        return False


class End:
    """A node that has something else to say now and then, and may be started anew."""

    def __init__(self, name: str, contents: list[NodeFacts]) -> None:
        self.name = name
        self.contents = contents
        self.boot = 0
        self.said: dict[tuple[str, int], NodeFacts] = {}
        self.start()

    def start(self) -> None:
        self.boot += 1
        self.sequence = 0
        self.tellings = Tellings()
        self.change(0)

    def change(self, which: int) -> None:
        self.sequence += 1
        content = self.contents[which % len(self.contents)]
        slots = {s.slot: s for s in content.slots}
        jobs = {j.job: j for j in content.jobs}
        self.facts = replace(
            content,
            node=self.name,
            boot=f"b{self.boot}",
            sequence=self.sequence,
            cluster_id="c",
            address="h:1",
            slots=tuple(slots[s] for s in sorted(slots)),
            jobs=tuple(jobs[j] for j in sorted(jobs)),
        )
        self.said[self.facts.boot, self.facts.sequence] = self.facts

    def to(self, other: End) -> pb.Telling:
        return self.tellings.message(other.name, self.facts)


def exchanged(asking: End, answering: End) -> NodeFacts | None:
    """As rpc.node does it, once."""
    answering.tellings.take(asking.to(answering))
    return asking.tellings.take(answering.to(asking))


@settings(max_examples=60)
@given(
    st.lists(likely.nodes().filter(sound), min_size=2, max_size=4), st.integers(0, 2**32), st.data()
)
def test_what_is_taken_was_said(contents: list[NodeFacts], seed: int, data: st.DataObject) -> None:
    del data
    chance = random.Random(seed)
    ends = End("a", contents), End("b", contents)
    on_their_way: list[tuple[End, pb.Telling]] = []
    for _ in range(60):
        speaker, hearer = chance.sample(ends, 2)
        match chance.choice(["change", "change", "send", "send", "arrive", "arrive", "start"]):
            case "change":
                speaker.change(chance.randrange(9))
            case "send":
                on_their_way.append((hearer, speaker.to(hearer)))
            case "arrive" if on_their_way:
                chance.shuffle(on_their_way)
                hearer, message = on_their_way.pop()
                taken = hearer.tellings.take(message)
                if taken is not None:
                    other = next(end for end in ends if end is not hearer)
                    assert taken == other.said[taken.boot, taken.sequence]
            case "start" if chance.random() < 0.2:
                speaker.start()
    # Whatever had happened: at most the second exchange brings all of both.
    one, two = ends
    exchanged(one, two)
    assert exchanged(one, two) == two.facts
    assert one.tellings.has_heard("b", one.facts)
    assert two.tellings.take(one.to(two)) == one.facts


def test_what_is_told_whole_is_answered_with_all() -> None:
    facts = NodeFacts("c", "x", "b", 1, "h:1")
    one, two = End("a", [facts]), End("b", [facts])
    exchanged(one, two)
    late = one.to(two)  # it says that it has heard little, and comes when more was heard
    two.change(0)
    exchanged(one, two)
    two.change(0)
    two.tellings.take(late)
    assert one.tellings.take(two.to(one)) is None
    two.tellings.take(one.tellings.message("b", one.facts, whole=True))
    assert one.tellings.take(two.to(one)) == two.facts
    assert one.tellings.has_heard("b", one.facts)


def test_what_is_known_is_not_told_again() -> None:
    names = [f"n{i:04d}" for i in range(1000)]
    many = NodeFacts("c", "x", "b", 1, "h:1", members=tuple((n, "h:1") for n in names))
    one, two = End("a", [many]), End("b", [many])
    whole = one.to(two).ByteSize()
    exchanged(one, two)
    exchanged(one, two)
    assert one.to(two).ByteSize() < 64 < whole
    one.change(1)
    assert one.to(two).ByteSize() < 64


def test_who_has_heard_too_old_facts_is_told_all() -> None:
    facts = NodeFacts("c", "x", "b", 1, "h:1")
    one, two = End("a", [facts]), End("b", [facts])
    exchanged(one, two)
    for _ in range(KEPT + 1):
        one.change(0)
        one.tellings.message("c", one.facts)
    assert one.to(two).WhichOneof("facts") == "whole"


@pytest.mark.parametrize(
    ("difference", "what"),
    [
        ({"jobs": [pb.JobDifference(facts=pb.JobFacts(job="new"), same_decision=True)]}, "as befo"),
        ({"slots": [pb.SlotFacts(slot=70)]}, "local rank 70 is beyond"),
        ({"jobs": [pb.JobDifference()]}, "takes 0 bytes"),
        (
            {"jobs": [pb.JobDifference(facts=pb.JobFacts(job=f"j{i}")) for i in range(17_000)]},
            "17000 jobs",
        ),
        ({"members": pb.Members(members=[pb.PeerAddress(address="a:1")])}, "of 0 characters"),
    ],
)
def test_differences_that_make_no_sense(difference: dict[str, object], what: str) -> None:
    tellings = Tellings()
    tellings.take(pb.Telling(whole=node_to(NodeFacts("c", "x", "b", 1, "h:1"))))
    told = pb.Difference(node="x", boot="b", base=1, sequence=2, **difference)
    with pytest.raises(RequestError, match=what):
        tellings.take(pb.Telling(difference=told))
    # What was known before is still the base of what comes next.
    assert tellings.take(pb.Telling(difference=pb.Difference(node="x", boot="b", sequence=1)))


def test_a_telling_of_nothing() -> None:
    with pytest.raises(RequestError, match="without facts"):
        Tellings().take(pb.Telling())


def test_as_many_nodes_are_remembered_as_there_may_be() -> None:
    tellings = Tellings()
    for number in range(1100):
        tellings.take(pb.Telling(whole=node_to(NodeFacts("c", f"n{number}", "b", 1, "h:1"))))
    assert len(tellings._peers) == 1024
