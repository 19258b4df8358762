"""What one slot holds: shards and parity blocks, each complete and verified."""

from __future__ import annotations

from snapshotd.metadata import DataHolding, ParityHolding, ParityPlace, Version

Holding = DataHolding | ParityHolding


class Holdings:
    """The slot's sealed bytes by what they are; one of each."""

    def __init__(self) -> None:
        self._data: dict[tuple[str, int, Version], DataHolding] = {}
        self._parity: dict[tuple[str, Version, ParityPlace], ParityHolding] = {}
        self._sorted: tuple[tuple[DataHolding, ...], tuple[ParityHolding, ...]] | None = None

    def keep(self, holding: Holding) -> None:
        """In the place of the one that was there, if any."""
        self._sorted = None
        if isinstance(holding, DataHolding):
            self._data[holding.job, holding.shard, holding.version] = holding
        else:
            self._parity[holding.job, holding.version, holding.place] = holding

    def lose(self, holding: Holding) -> None:
        self._sorted = None
        if isinstance(holding, DataHolding):
            self._data.pop((holding.job, holding.shard, holding.version), None)
        else:
            self._parity.pop((holding.job, holding.version, holding.place), None)

    def published(self) -> tuple[tuple[DataHolding, ...], tuple[ParityHolding, ...]]:
        """All shards and all parity blocks, in an order that does not depend on the past."""
        if self._sorted is None:
            data = sorted(self._data.values(), key=lambda d: (d.job, d.shard, d.version))
            parity = sorted(self._parity.values(), key=lambda p: (p.job, p.version, p.place))
            self._sorted = tuple(data), tuple(parity)
        return self._sorted

    def of(self, job: str) -> list[Holding]:
        data = (d for d in self._data.values() if d.job == job)
        return [*data, *(p for p in self._parity.values() if p.job == job)]

    def shards(self) -> set[tuple[str, int, Version]]:
        """Job, shard and version of every shard."""
        return set(self._data)

    def versions(self, job: str) -> list[Version]:
        """Of which some shard is here, oldest first."""
        return sorted({d.version for d in self._data.values() if d.job == job})

    def generations(self, job: str, shard: int, more: Version | None = None) -> int:
        """How many versions of a shard are here; `more` counts if any shard of it is."""
        mine = (d for d in self._data.values() if d.job == job)
        return len({d.version for d in mine if d.shard == shard or d.version == more})
