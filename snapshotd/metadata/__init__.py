"""The nouns of the system as frozen values: versions, places, holdings, decisions, facts.

No behaviour beyond ordering and look-up; `convert` and `facts` of `snapshotd.rpc` turn them into
messages and back. Words as in the glossary of DESIGN.md.
"""

from snapshotd.metadata.facts import (
    Accusation,
    Cadence,
    Economy,
    JobFacts,
    NodeFacts,
    Orders,
    PersistFacts,
    SlotCounters,
    SlotFacts,
    TrainerFacts,
    Vow,
)
from snapshotd.metadata.nouns import (
    DataHolding,
    Decision,
    DecisionId,
    Group,
    Home,
    Member,
    ParityHolding,
    ParityPlace,
    RefusalKind,
    Stored,
    StoredStep,
    Tier,
    Unsealed,
    Version,
)

__all__ = [
    "Accusation",
    "Cadence",
    "DataHolding",
    "Decision",
    "DecisionId",
    "Economy",
    "Group",
    "Home",
    "JobFacts",
    "Member",
    "NodeFacts",
    "Orders",
    "ParityHolding",
    "ParityPlace",
    "PersistFacts",
    "RefusalKind",
    "SlotCounters",
    "SlotFacts",
    "Stored",
    "StoredStep",
    "Tier",
    "TrainerFacts",
    "Unsealed",
    "Version",
    "Vow",
]
