"""The config of the run that lives in a workdir, as a config file: --config=…/workdir_config.py:WORKDIR."""

import dataclasses
import pathlib

import ml_collections

from searchr1_jax.run import run_directory


def get_config(workdir: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(dataclasses.asdict(run_directory.settings_of(pathlib.Path(workdir))))
