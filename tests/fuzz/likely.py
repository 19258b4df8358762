"""Facts that are well formed and may contradict each other in every way."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from snapshotd.metadata import (
    Cadence,
    DataHolding,
    Decision,
    DecisionId,
    Group,
    Home,
    JobFacts,
    Member,
    NodeFacts,
    Orders,
    ParityHolding,
    ParityPlace,
    PersistFacts,
    SlotFacts,
    Tier,
    TrainerFacts,
    Version,
)
from tests.fuzz.messages import DIGESTS

NODES = ["n0", "n1", "n2"]
JOBS = ["job", "job", "job", "other"]
FAR = 1 << 48  # the greatest epoch and step that are taken

epochs = st.sampled_from([0, 1, 2, 2, 3, FAR])
steps = st.sampled_from([0, 1, 1, 2, 3, FAR])
versions = st.builds(Version, epochs, steps)
homes = st.builds(Home, st.sampled_from(NODES), st.sampled_from([0, 0, 1]))
sizes = st.sampled_from([0, 1, 4096, 9000, 9000, 1 << 20, 1 << 44])
shards = st.sampled_from([0, 0, 1, 1, 2, 3, 2**32 - 1])
digests = st.sampled_from(DIGESTS)


@st.composite
def places(draw: Any) -> ParityPlace:
    members = draw(st.sampled_from([(0, 1), (0, 1), (0, 1, 2), (1, 0), (5, 2**32 - 1), (0, 1, 3)]))
    parity = draw(st.integers(1, len(members) - 1))
    return ParityPlace(
        members, parity, draw(st.integers(0, len(members) - 1)), draw(st.integers(0, parity - 1))
    )


@st.composite
def parities(draw: Any) -> ParityHolding:
    place = draw(places())
    count = len(place.shards)
    return ParityHolding(
        draw(st.sampled_from(JOBS)),
        draw(versions),
        place,
        draw(sizes),
        tuple(draw(digests) for _ in range(count)),
        tuple(draw(sizes) for _ in range(count)),
    )


datas = st.builds(DataHolding, st.sampled_from(JOBS), shards, versions, sizes, digests)
decision_ids = st.builds(DecisionId, epochs, st.sampled_from(NODES))


@st.composite
def groups(draw: Any) -> Group:
    members = draw(st.lists(st.builds(Member, shards, homes), min_size=1, max_size=4))
    ordered = tuple(sorted(set(members)))
    return Group(ordered, draw(st.integers(0, len(ordered) - 1)))


@st.composite
def usual_group(draw: Any) -> Group:
    size = draw(st.integers(1, 3))
    members = tuple(Member(i, Home(NODES[i], 0)) for i in range(size))
    return Group(members, draw(st.integers(0, size - 1)))


@st.composite
def decisions(draw: Any, job: str) -> Decision:
    world = draw(st.integers(1, 3))
    outcome = draw(st.sampled_from(["restore", "fresh", "refusal"]))
    found = draw(st.one_of(st.lists(usual_group(), max_size=1), st.lists(groups(), max_size=3)))
    return Decision(
        draw(decision_ids),
        job,
        world,
        tuple(found),
        tuple(draw(st.sampled_from(["i0", "i1", "i2"])) for _ in range(world)),
        draw(versions) if outcome == "restore" else None,
        "for a reason" if outcome == "refusal" else "",
        draw(st.sampled_from(list(Tier))),
        draw(st.none() | versions),
    )


@st.composite
def job_facts(draw: Any) -> JobFacts:
    job = draw(st.sampled_from(JOBS))
    return JobFacts(
        job,
        draw(st.sampled_from([0, 1, 2, 3, 40])),
        draw(epochs),
        draw(epochs),
        draw(st.none() | versions),
        draw(epochs),
        draw(st.none() | decisions(job)),
        Cadence(draw(st.sampled_from([1, 2, FAR])), draw(steps)),
    )


@st.composite
def trainers(draw: Any) -> TrainerFacts:
    world = draw(st.sampled_from([1, 2, 2, 3, 40]))
    return TrainerFacts(
        draw(st.sampled_from(JOBS)),
        draw(st.sampled_from(["r", "r2"])),
        0,
        draw(st.sampled_from(["i0", "i1", "i2"])),
        draw(st.integers(0, min(world - 1, 2))),
        world,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.none() | decision_ids),
        draw(st.booleans()),
        draw(st.sampled_from(["", "broken"])),
        draw(steps),
        draw(steps),
        draw(st.booleans()),
    )


slots = st.builds(
    SlotFacts,
    st.sampled_from([0, 0, 1, 63]),
    st.sampled_from(["", "127.0.0.1:9", "127.0.0.2:9"]),
    st.none() | trainers(),
    st.lists(datas, max_size=4).map(tuple),
    st.lists(parities(), max_size=4).map(tuple),
    persist=st.lists(
        st.builds(
            PersistFacts,
            st.sampled_from(JOBS),
            target=st.none() | versions,
            written=st.none() | versions,
            gone=st.none() | versions,
        ),
        max_size=2,
    ).map(tuple),
)


@st.composite
def nodes(draw: Any) -> NodeFacts:
    node = draw(st.sampled_from(["n1", "n1", "n2", "n0", "x"]))
    members = st.tuples(st.sampled_from([*NODES, "x"]), st.sampled_from(["127.0.0.1:1"]))
    return NodeFacts(
        "test",
        node,
        draw(st.sampled_from(["1", "2"])),
        draw(st.integers(0, 3)),
        f"127.0.0.1:{1 + len(node)}",
        tuple(draw(st.lists(members, max_size=2))),
        tuple(draw(st.lists(slots, max_size=3))),
        tuple(draw(st.lists(job_facts(), max_size=2))),
    )


orders = st.builds(
    Orders,
    st.lists(job_facts(), max_size=2).map(tuple),
    st.dictionaries(homes, slots, max_size=4).map(
        lambda found: {Home(h.node, f.slot): f for h, f in found.items()}
    ),
    st.dictionaries(st.sampled_from(JOBS), st.just("not yet"), max_size=1),
)
