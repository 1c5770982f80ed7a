"""What a setting names: a row of a table, or something of the user's own, as "package.module:name"."""

from __future__ import annotations

from collections.abc import Mapping
import importlib
from typing import TypeVar

T = TypeVar("T")


def resolve(name: str, table: Mapping[str, T], key: str) -> T:
    """The table's row of that name, or what "package.module:name" names.

    Args:
      key: the setting that holds the name, for the error.
    Raises:
      ValueError: naming the key, the name and what it may be.
    """
    if name in table:
        return table[name]
    choices = ", ".join([*table, "package.module:name"])
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{key} is {name!r}; choose from {choices}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key} is {name!r}, which could not be imported ({error}); choose from {choices}") from error
