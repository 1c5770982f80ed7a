"""What a setting names."""

import math

import pytest

from searchr1_jax.core import names

TABLE = {"one": 1, "two": 2}


def test_a_name_is_a_row_of_the_table_or_something_of_the_users_own():
    assert names.resolve("two", TABLE, "a.b") == 2
    assert names.resolve("math:tau", TABLE, "a.b") == math.tau


@pytest.mark.parametrize("name", ["", "three", "math", ":tau", "math:", "math.tau", "math:none", "no.such.module:tau"])
def test_any_other_name_is_refused_with_the_key_and_the_choices(name):
    with pytest.raises(ValueError, match=f"^a.b is '{name}'.*choose from one, two, package.module:name$"):
        names.resolve(name, TABLE, "a.b")
