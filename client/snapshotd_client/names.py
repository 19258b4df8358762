"""Fully qualified names that do not tell how a module is wrapped, compiled or spread.

As torch.distributed.checkpoint.state_dict has them, with the name given to Snapshotter in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

#: What torch.compile, activation checkpointing and FSDP1 put between two parts of a name.
_WRAPPERS: Final = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
#: torch calls what these wrap so; in other modules that is a name like any other.
_HOLDERS: Final = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
_HELD: Final = "module"


def unwrapped(key: str) -> str:
    """A key of a module's state_dict without anything that a wrapper may have put in."""
    return ".".join(p for p in key.split(".") if p not in _WRAPPERS and p != _HELD)


class Names:
    """Names of the tensors of `states`, whatever their modules are wrapped in."""

    def __init__(self, states: Mapping[str, object]) -> None:
        # Paths, as lists of their parts, whose last part is left out.
        self._left_out = {
            (*f"{owner}.{path}".rstrip(".").split("."), _HELD)
            for owner, state in states.items()
            if isinstance(state, torch.nn.Module)
            for path, module in state.named_modules()
            if isinstance(module, _HOLDERS)
        }
        #: Of each parameter of a captured module, by its id.
        self.parameters = {
            id(parameter): self.of_module(f"{owner}.{path}")
            for owner, state in states.items()
            if isinstance(state, torch.nn.Module)
            for path, parameter in state.named_parameters()
        }
        self._numbered = {
            owner: [
                self.parameters.get(id(p), str(number))
                for number, p in enumerate(p for g in state.param_groups for p in g["params"])
            ]
            for owner, state in states.items()
            if isinstance(state, torch.optim.Optimizer)
        }

    def of_module(self, name: str) -> str:
        """The plain name of a tensor of a module, which opens with its owner's name."""
        parts = name.split(".")
        return ".".join(
            part
            for i, part in enumerate(parts)
            if part not in _WRAPPERS
            and not (part == _HELD and tuple(parts[: i + 1]) in self._left_out)
        )

    def of(self, owner: str, name: str) -> str:
        """The plain name of the tensor `name` of any owner.

        torch numbers the parameters in the state of an optimizer; here they have their names.
        """
        numbered = self._numbered.get(owner)
        if numbered is None:
            return self.of_module(name)
        head, _, rest = name.removeprefix(f"{owner}.state.").partition(".")
        if not name.startswith(f"{owner}.state.") or not head.isdigit():
            return name
        if int(head) >= len(numbered):
            return name
        return ".".join(filter(None, [f"{owner}.state", numbered[int(head)], rest]))
