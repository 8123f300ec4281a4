"""Checks of a monitor's saved state: a damaged or foreign one is refused before anything changes.

A state holds numbers, strings, dicts and None only: ``torch.load(weights_only=True)`` and JSON bring it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import AdcertError

FORMAT = "adcert.Monitor"
VERSION = 1


def opened(state: Any, options: Mapping[str, Any], parts: Iterable[str]) -> dict[str, Any]:
    """The parts of a state of this version that was saved with the same options.

    Raises:
        AdcertError: if it is anything else.
    """
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise AdcertError("this is not the state of a monitor: load what monitor.state_dict() has given")
    if state.get("version") != VERSION:
        raise AdcertError(
            f"the monitor's state has version {state.get('version')!r}, this adcert reads {VERSION}: "
            "resume with the adcert that saved it"
        )
    found = fields(state, ("format", "version", *options, *parts), "the state")
    for name, value in options.items():
        if type(found[name]) is not type(value) or found[name] != value:
            raise AdcertError(
                f"the state was saved with {name}={found[name]!r}, this monitor has {name}={value!r}: "
                "totals of the two do not add up, make the monitor with the same"
            )
    return found


def fields(value: Any, names: Iterable[str], what: str) -> dict[str, Any]:
    """A dict with exactly these names."""
    expected = set(names)
    if not isinstance(value, Mapping) or set(value) != expected:
        found = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise damaged(f"{what} should have {sorted(expected)}, it has {found}")
    return dict(value)


def count(value: Any, what: str) -> int:
    """An int >= 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise damaged(f"{what} should be a number of things, it is {value!r}")
    return value


def counts(value: Any, what: str) -> dict[str, int]:
    """A dict of names with an int >= 0 each."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise damaged(f"{what} should be counts by name")
    return {name: count(number, f"{what}, {name!r},") for name, number in value.items()}


def damaged(why: str) -> AdcertError:
    """The error that says so."""
    return AdcertError(f"the monitor's state is damaged: {why}")
