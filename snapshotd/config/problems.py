"""Turn refused values into one error that an operator can act on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from snapshotd.config.sources import DEFAULT, Setting, known_keys, variable_name
from snapshotd.errors import ConfigError

_EXPECTED: Final = {
    "string_pattern_mismatch": "1 to 63 letters, digits, dots, dashes or underscores, "
    "the first a letter or digit",
    "byte_size": 'bytes, like 1073741824 or "400GiB"',
    "byte_size_unit": 'bytes, like 1073741824 or "400GiB"',
    "model_type": "a table of keys",
    "dict_type": "a table of keys",
    "mapping_type": "a table of keys",
}


def explain(error: ValidationError, settings: Mapping[str, Setting]) -> ConfigError:
    """Say of each refused value: key, origin, what was wrong, what was expected, what to do."""
    problems = [
        _problem(detail, settings)
        for detail in error.errors()
        # Follows from another error of the list.
        if detail["type"] != "default_factory_not_called"
    ]
    if len(problems) == 1:
        what, remedy = problems[0]
        return ConfigError(what, remedy)
    lines = "".join(f"\n  {what}. {remedy}." for what, remedy in problems)
    return ConfigError(f"{len(problems)} settings are wrong:{lines}\nNothing was started")


def _problem(detail: ErrorDetails, settings: Mapping[str, Setting]) -> tuple[str, str]:
    # A refused name of a peer has the location ("peers", name, "[key]").
    key = ".".join(str(part) for part in detail["loc"] if part != "[key]")
    if detail["type"] == "missing":
        return _missing(key)
    origin = settings[key].origin if key in settings else DEFAULT
    if detail["type"] == "extra_forbidden":
        return f"{key} ({origin}) is an unknown key; {_likely(key)}", origin.remedy
    what = f"{_subject(key, detail, settings)}: {_complaint(detail)}"
    # A rule between keys: name the others, and let those be mended that somebody did set.
    related = [k for k in detail.get("ctx", {}).get("related", []) if k in settings]
    what += "".join(f"; {k} comes from {settings[k].origin}" for k in related)
    if key in settings or not related:
        return what, origin.remedy
    remedies = dict.fromkeys(settings[k].origin.remedy for k in related)
    return what, ". Or: ".join(remedies)


def _subject(key: str, detail: ErrorDetails, settings: Mapping[str, Setting]) -> str:
    if key not in settings and key not in known_keys():
        return key
    origin = settings[key].origin if key in settings else DEFAULT
    return f"{key} = {detail['input']!r} ({origin})"


def _complaint(detail: ErrorDetails) -> str:
    if detail["type"] in _EXPECTED:
        return f"expected {_EXPECTED[detail['type']]}"
    expected = detail.get("ctx", {}).get("expected")
    if expected is None or detail["type"] == "literal_error":
        return "expected " + detail["msg"].removeprefix("Input should be ")
    return f"{detail['msg']}; expected {expected}"


def _missing(key: str) -> tuple[str, str]:
    flag = "--" + key.replace("_", "-")
    return (
        f"{key} is set nowhere, and has no default; it is {known_keys()[key].description}",
        f"Set {key} in the config file, or {variable_name(key)}, or {flag}",
    )


def _likely(key: str) -> str:
    """The known key it was probably meant to be; the section may be what is missing."""
    by_name = {known.rpartition(".")[2]: known for known in known_keys()}
    near = difflib.get_close_matches(key, known_keys(), n=1)
    if not near:
        last = key.rpartition(".")[2]
        near = [by_name[name] for name in difflib.get_close_matches(last, by_name, n=1)]
    if near:
        return f"the nearest known key is {near[0]}"
    return "`snapshotd serve --help` lists the known ones"
