"""The oracles bite: each planted fault of the protocol is seen, and its seed passes without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .__main__ import main
from .mutations import MUTATIONS, Mutation, planted
from .run import case_of, run
from .shrink import read, shrink, written

#: What a mutation that no longer fits the code raises: no law has seen anything then.
MISFITS = ("TypeError", "AttributeError", "NameError", "KeyError")


def caught(mutation: Mutation) -> tuple[int, str]:
    """The first seed of its range that shows the mutation, and the law that saw it."""
    with planted(mutation):
        for seed in range(mutation.start, mutation.start + mutation.seeds):
            law = run(case_of(seed, mutation.rare)).law
            assert not law.startswith(MISFITS), f"{mutation.name!r} does not fit the code: {law}"
            if law:
                return seed, law
    raise AssertionError(f"{mutation.name!r} was not seen in {mutation.seeds} seeds")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_is_caught(mutation: Mutation) -> None:
    seed, law = caught(mutation)
    assert law
    assert not run(case_of(seed, mutation.rare)).law, "the same seed fails without the mutation too"


def test_a_failure_is_shrunk_to_few_faults_that_replay_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mutation = next(m for m in MUTATIONS if m.name == "free before the new groups protect")
    seed, law = caught(mutation)
    path = tmp_path / "case.txt"
    with planted(mutation):
        small = shrink(case_of(seed), law, runs=40)
        path.write_text(written(small, run(small)))
        assert main(["--replay", str(path)]) == 1
    assert law in capsys.readouterr().out
    assert len(small.faults) < len(case_of(seed).faults)
    assert read(path.read_text()) == small
    assert main(["--replay", str(path)]) == 0, "without the mutation it passes"
