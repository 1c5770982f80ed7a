"""Every key of a run with its default, as a config that files and flags change; meanings and rules: core/settings.py.

A key is overridden on the command line with --config.section.key=value.
"""

import dataclasses
from typing import Any

import ml_collections

from searchr1_jax.core import settings


def get_config() -> Any:  # an ml_collections.ConfigDict, whose keys no type checker knows
    return ml_collections.ConfigDict(dataclasses.asdict(settings.Settings()))
