"""Names in a config: rows of a visible table, or what a module of the user's own defines."""

from collections.abc import Mapping
import importlib
from typing import TypeVar

T = TypeVar("T")


def resolve(name: str, table: Mapping[str, T], key: str) -> T:
    """What a name of the config stands for: a row of the table, or what `package.module:name` defines.

    Args:
      key: of the config, for the error.
    Raises:
      ValueError: for any other name, a module that cannot be imported, or one that does not define the name.
    """
    if name in table:
        return table[name]
    choices = f"one of {', '.join(table)}, or package.module:name"
    module, _, defined = name.partition(":")
    if not (module and defined) or module.startswith("."):
        raise ValueError(f"{key} names {name!r}; make it {choices}")
    try:
        return getattr(importlib.import_module(module), defined)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key} names {name!r}, which could not be imported ({error}); make it {choices}") from error
