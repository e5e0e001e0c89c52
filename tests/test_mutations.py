"""The list of mutations is up to date with the package."""

import re

import mutate


def test_every_mutation_finds_its_place() -> None:
    assert mutate.misplaced() == []
    assert len(mutate.ALL) >= 120 and len(set(mutate.ALL)) == len(mutate.ALL)


def test_a_mutation_changes_one_thing() -> None:
    for mutation in mutate.ALL:
        assert len(re.findall("«.*? → .*?»", mutation.text, re.S)) == 1, mutation
        assert mutation.applied(False) != mutation.applied(True)
    assert mutate.Mutation("", "a «+ → -» b").applied(False) == "a + b"
    assert mutate.Mutation("", "a «+ → -» b").applied(True) == "a - b"


def test_what_is_explained_is_there() -> None:
    assert set(mutate.EXPLAINED) <= {mutation.text for mutation in mutate.ALL}
