"""Samples that come in parts, batch by batch and process by process: cut, moved and put together field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def combine(parts: Sequence[T], function: Callable[[Sequence[Any]], Any]) -> T:
    """One value of the parts' type. Each of its arrays is ``function`` of the parts' arrays in the same place.

    Args:
        parts: dataclasses or mappings, nested as you like, with arrays as leaves. All have the keys of the first.
        function: takes a list of arrays, one of each part, such as `torch.cat`.
    """
    first: Any = parts[0]
    if isinstance(first, Mapping):
        combined: Any = {key: combine([part[key] for part in parts], function) for key in first}  # type: ignore[index]
    elif dataclasses.is_dataclass(first) and not isinstance(first, type):
        fields = {f.name: combine([getattr(part, f.name) for part in parts], function) for f in dataclasses.fields(first)}
        combined = dataclasses.replace(first, **fields)
    else:
        combined = function(parts)
    return combined  # type: ignore[no-any-return]


def convert(value: T, function: Callable[[Any], Any]) -> T:
    """The same value with ``function`` applied to each of its arrays; see `combine`."""
    return combine([value], lambda arrays: function(arrays[0]))
