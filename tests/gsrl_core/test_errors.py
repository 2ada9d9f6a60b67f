"""Messages."""

from gsrl_core.errors import listed


def test_a_list_shows_a_few_names():
    assert listed("ab", 3) == "a, b"
    assert listed("abc", 3) == "a, b, c"
    assert listed("abcde", 3) == "a, b, c and 2 more"
