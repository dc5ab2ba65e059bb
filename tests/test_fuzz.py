"""A part of the soak of `fuzz.py`: calls of random settings, each compared with plain decoding."""

from fuzz import DIMENSIONS, soak


def test_calls_of_random_settings_give_the_text_of_plain_decoding():
    counts = soak(seed=2, numbers=range(25))
    assert counts["calls"] == 25
    assert all(counts[f"calls with {name}"] for name in DIMENSIONS), "some dimension was never drawn"
    assert counts["accepted"] > 50, "nothing was drafted well, so this shows little"
    assert counts["near ties"] <= 1
