"""A part of the soak of `fuzz.py`: calls of random settings, each compared with plain decoding."""

from fuzz import soak


def test_calls_of_random_settings_give_the_text_of_plain_decoding():
    counts = soak(seed=0, numbers=range(40))
    assert counts["calls"] == 40
    assert counts["accepted"] > 100, "nothing was drafted well, so this shows little"
    assert counts["near ties"] <= 1
