"""Names in a config: rows of a table, and what a module defines."""

import math

import pytest

from searchr1_jax.core import names

TABLE = {"one": 1, "two": 2}


def test_a_name_of_the_table_is_its_row():
    assert names.resolve("two", TABLE, "some.key") == 2


def test_a_module_and_a_name_are_what_the_module_defines():
    assert names.resolve("math:pi", TABLE, "some.key") == math.pi


@pytest.mark.parametrize("name", ["", "three", "math", "math:", ":pi", "math.pi", ".math:pi"])
def test_any_other_name_is_refused_with_the_key_and_the_choices(name):
    with pytest.raises(ValueError, match=f"^some.key names '{name}'; make it one of one, two, or package.module:name$"):
        names.resolve(name, TABLE, "some.key")


@pytest.mark.parametrize(
    "name, cause",
    [
        ("no_such_module:x", "No module named 'no_such_module'"),
        ("math:no_such", "'math' has no attribute 'no_such'"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_cause(name, cause):
    with pytest.raises(ValueError, match=f"some.key names '{name}', which could not be imported .*{cause}.*one, two"):
        names.resolve(name, TABLE, "some.key")
