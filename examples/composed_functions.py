"""Requests to complete Python functions that are composed of parts, with docstrings and solved examples.

`prepare_prompts.py --compose N` writes N of them. They have the form of HumanEval's prompts, but none of their tasks:
a head drafts better once it has seen how its target answers prompts of a form. A task is something to do with those
elements that fulfill a condition, as in "Return the sum of the numbers that are divisible by 3."
"""

import math
import random
import re
from collections.abc import Callable, Iterator
from itertools import accumulate, zip_longest
from typing import Any


WORDS = re.compile(r"\w+").findall(
    "apple banana cherry stone river garden window yellow silver market travel planet python summer castle bridge "
    "simple letter mirror orange pencil rocket shadow ticket velvet winter forest hammer island jacket kitten ladder "
    "Hello World Madam level noon radar Alice Bob data code test Good Day cat dog bird fish tree sun moon"
)
# Values by type. The parameter `k` is a small number.
MAKERS: dict[str, Callable[[random.Random], Any]] = {
    "List[int]": lambda rng: [rng.randint(-9, 40) for _ in range(rng.randint(3, 6))],
    "List[str]": lambda rng: rng.choices(WORDS, k=rng.randint(2, 5)),
    "str": lambda rng: " ".join(rng.choices(WORDS, k=rng.randint(1, 5))),
    "int": lambda rng: rng.randint(3, rng.choice([20, 60, 300])),
}
PARAMETER = re.compile(r"(\w+): (List\[\w+\]|\w+)")
Task = tuple[str, str, Callable[..., Any]]  # signature, description, solution
Test = Callable[[Any], bool]


def _is_prime(x: int) -> bool:
    return x > 1 and all(x % divisor for divisor in range(2, math.isqrt(x) + 1))


def _divisors(n: int) -> list[int]:
    return [divisor for divisor in range(1, n + 1) if n % divisor == 0]


def _collatz(n: int) -> list[int]:
    return [n] if n == 1 else [n, *_collatz(n // 2 if n % 2 == 0 else 3 * n + 1)]


def _number_conditions(k: int) -> list[tuple[str, str, Test]]:
    """Name, what fulfills it, and test of conditions."""
    return [
        ("even", "even numbers", lambda x: x % 2 == 0),
        ("odd", "odd numbers", lambda x: x % 2 == 1),
        ("positive", "positive numbers", lambda x: x > 0),
        ("negative", "negative numbers", lambda x: x < 0),
        ("prime", "prime numbers", _is_prime),
        ("two_digit", "two-digit numbers", lambda x: 10 <= abs(x) < 100),
        ("square", "perfect squares", lambda x: x >= 0 and math.isqrt(x) ** 2 == x),
        (f"greater_than_{k}", f"numbers that are greater than {k}", lambda x: x > k),
        (f"smaller_than_{k}", f"numbers that are smaller than {k}", lambda x: x < k),
        (f"divisible_by_{k}", f"numbers that are divisible by {k}", lambda x: x % k == 0),
    ]


def _string_conditions(k: int, letter: str) -> list[tuple[str, str, Test]]:
    return [
        ("start_with_vowel", "start with a vowel", lambda s: s[0].lower() in "aeiou"),
        ("start_with_uppercase", "start with an uppercase letter", lambda s: s[0].isupper()),
        ("are_palindromes", "are palindromes", lambda s: s.lower() == s.lower()[::-1]),
        ("have_even_length", "have an even number of characters", lambda s: len(s) % 2 == 0),
        (f"end_with_{letter}", f"end with the letter '{letter}'", lambda s: s[-1] == letter),
        (f"contain_{letter}", f"contain the letter '{letter}'", lambda s: letter in s),
        (f"are_longer_than_{k}", f"are longer than {k} characters", lambda s: len(s) > k),
    ]


def _character_conditions(letter: str) -> list[tuple[str, str, Test]]:
    return [
        ("vowels", "vowels", lambda c: c.lower() in "aeiou"),
        ("consonants", "consonants", lambda c: c.isalpha() and c.lower() not in "aeiou"),
        ("uppercase_letters", "uppercase letters", str.isupper),
        ("lowercase_letters", "lowercase letters", str.islower),
        ("spaces", "spaces", str.isspace),
        (f"letters_{letter}", f"letters '{letter}'", lambda c: c == letter),
    ]


def _number_changes(k: int) -> list[tuple[str, str, Callable[[int], int]]]:
    """Name, what a changed element is, and change."""
    return [
        ("square", "squared", lambda x: x * x),
        ("cube", "cubed", lambda x: x**3),
        ("negate", "negated", lambda x: -x),
        ("absolute", "replaced by its absolute value", abs),
        (f"add_{k}", f"increased by {k}", lambda x: x + k),
        (f"multiply_by_{k}", f"multiplied by {k}", lambda x: x * k),
        (f"modulo_{k}", f"reduced modulo {k}", lambda x: x % k),
    ]


STRING_CHANGES: list[tuple[str, str, Callable[[str], str]]] = [
    ("reverse", "reversed", lambda s: s[::-1]),
    ("upper", "in upper case", str.upper),
    ("capitalize", "capitalized", str.capitalize),
    ("swap_case", "with case swapped", str.swapcase),
    ("double", "doubled", lambda s: s + s),
    ("remove_vowels", "with its vowels removed", lambda s: re.sub("[aeiouAEIOU]", "", s)),
    ("exchange_ends", "with its first and last letter exchanged", lambda s: s[-1] + s[1:-1] + s[0]),
]


def _conditional_tasks(rng: random.Random, k: int, letter: str) -> list[Task]:
    """Something to do with the elements that fulfill one condition, or with all of them."""
    number, numbers, holds = rng.choice(_number_conditions(k))
    change, changed, new = rng.choice(_number_changes(k))
    string, strings, fits = rng.choice(_string_conditions(k, letter))
    alter, altered, other = rng.choice(STRING_CHANGES)
    character, characters, counts = rng.choice(_character_conditions(letter))
    step, first, where = rng.choice([(2, 0, "at an even index"), (2, 1, "at an odd index"), (1, 0, "of the list")])
    place = where.split()[-2] if step > 1 else "all"

    def kept(values: list[int]) -> list[int]:
        return [*filter(holds, values)]

    of_numbers, of_strings = "(numbers: List[int])", "(strings: List[str])"
    return [
        (f"sum_{number}{of_numbers} -> int", f"Return the sum of the {numbers}.", lambda v: sum(kept(v))),
        (
            f"product_{number}{of_numbers} -> int",
            f"Return the product of the {numbers}.",
            lambda v: math.prod(kept(v)),
        ),
        (f"count_{number}{of_numbers} -> int", f"Count the {numbers} in the list.", lambda v: len(kept(v))),
        (f"largest_{number}{of_numbers} -> int", f"Return the largest of the {numbers}.", lambda v: max(kept(v))),
        (f"smallest_{number}{of_numbers} -> int", f"Return the smallest of the {numbers}.", lambda v: min(kept(v))),
        (f"filter_{number}{of_numbers} -> List[int]", f"Return the {numbers} of the list in their order.", kept),
        (f"sorted_{number}{of_numbers} -> List[int]", f"Return the {numbers}, sorted.", lambda v: sorted(kept(v))),
        (f"unique_{number}{of_numbers} -> List[int]", f"Return the distinct {numbers}.", lambda v: [*{*kept(v)}]),
        (f"reversed_{number}{of_numbers} -> List[int]", f"Return the {numbers}, last first.", lambda v: kept(v)[::-1]),
        (
            f"{change}_{place}{of_numbers} -> List[int]",
            f"Return a new list in which every element {where} is {changed}. The others stay the same.",
            lambda v: [new(x) if i % step == first else x for i, x in enumerate(v)],
        ),
        (
            f"count_strings_that_{string}{of_strings} -> int",
            f"Count the strings that {strings}.",
            lambda v: sum(map(fits, v)),
        ),
        (
            f"strings_that_{string}{of_strings} -> List[str]",
            f"Return only the strings that {strings}.",
            lambda v: [*filter(fits, v)],
        ),
        (
            f"words_that_{string}(sentence: str) -> List[str]",
            f"Return the words of a sentence that {strings}. Words are separated by spaces.",
            lambda s: [*filter(fits, s.split())],
        ),
        (
            f"{alter}_strings{of_strings} -> List[str]",
            f"Return a list with every string {altered}.",
            lambda v: [*map(other, v)],
        ),
        (
            f"{alter}_words(sentence: str) -> str",
            f"Return the sentence with each word {altered}. Words are separated by single spaces.",
            lambda s: " ".join(map(other, s.split())),
        ),
        (f"count_{character}(text: str) -> int", f"Count the {characters} of a text.", lambda s: sum(map(counts, s))),
        (
            f"remove_{character}(text: str) -> str",
            f"Remove all {characters} from a text.",
            lambda s: "".join(c for c in s if not counts(c)),
        ),
        (
            f"positions_of_{character}(text: str) -> List[int]",
            f"Return the positions of all {characters} in a text.",
            lambda s: [i for i, c in enumerate(s) if counts(c)],
        ),
        (
            f"has_{character}(text: str) -> bool",
            f"Return True if the text contains {characters}, and False otherwise.",
            lambda s: any(map(counts, s)),
        ),
    ]


def _number_tasks(k: int) -> list[Task]:
    """Something to do with one number."""
    return [
        ("sum_of_digits(n: int) -> int", "Return the sum of the digits of n.", lambda n: sum(map(int, str(n)))),
        ("largest_digit(n: int) -> int", "Return the largest digit of n.", lambda n: int(max(str(n)))),
        ("reverse_number(n: int) -> int", "Return n with its digits in reverse order.", lambda n: int(str(n)[::-1])),
        ("count_divisors(n: int) -> int", "Return the number of divisors of n.", lambda n: len(_divisors(n))),
        ("list_divisors(n: int) -> List[int]", "Return all divisors of n in ascending order.", _divisors),
        ("triangular_number(n: int) -> int", "Return the n-th triangular number.", lambda n: n * (n + 1) // 2),
        ("sum_of_cubes_to(n: int) -> int", "Sum up the cubes from 1 to n.", lambda n: (n * (n + 1) // 2) ** 2),
        ("is_square(n: int) -> bool", "Return True if n is a perfect square.", lambda n: math.isqrt(n) ** 2 == n),
        ("to_binary(n: int) -> str", "Return the binary representation of n as a string.", lambda n: f"{n:b}"),
        (
            "collatz(n: int) -> List[int]",
            "Return the Collatz sequence from n to 1: even numbers are halved, others tripled and increased by one.",
            _collatz,
        ),
        (f"is_multiple_of_{k}(n: int) -> bool", f"Return True if n is divisible by {k}.", lambda n: n % k == 0),
        (f"count_multiples_of_{k}(n: int) -> int", f"Count the multiples of {k} up to n.", lambda n: n // k),
        (f"is_power_of_{k}(n: int) -> bool", f"Is n a power of {k}?", lambda n: n in [k**i for i in range(9)]),
        (f"multiples_of_{k}(n: int) -> List[int]", f"List {k}, {2 * k} ... up to n.", lambda n: [*range(k, n + 1, k)]),
    ]


def _list_tasks() -> list[Task]:
    """Something to do with a list, a list and a number, or two lists."""
    one, with_k, two = "numbers: List[int]", "numbers: List[int], k: int", "first: List[int], second: List[int]"
    return [
        (f"running_sum({one}) -> List[int]", "Return the running sums of the list.", lambda v: [*accumulate(v)]),
        (f"running_minimum({one}) -> List[int]", "Return the smallest so far.", lambda v: [*accumulate(v, min)]),
        (
            f"differences({one}) -> List[int]",
            "Return what neighbors differ by.",
            lambda v: [*map(int.__sub__, v[1:], v)],
        ),
        (f"second_largest({one}) -> int", "Return the second largest distinct number.", lambda v: sorted({*v})[-2]),
        (
            f"middle_element({one}) -> int",
            "Return the lower middle of the sorted list.",
            lambda v: sorted(v)[(len(v) - 1) // 2],
        ),
        (f"most_frequent({one}) -> int", "Return the most frequent number.", lambda v: max(v, key=v.count)),
        (f"has_duplicates({one}) -> bool", "Return True if a number occurs twice.", lambda v: len({*v}) < len(v)),
        (f"is_sorted({one}) -> bool", "Return True if the list is in ascending order.", lambda v: v == sorted(v)),
        (
            f"swap_ends({one}) -> List[int]",
            "Exchange the first and the last element.",
            lambda v: [v[-1], *v[1:-1], v[0]],
        ),
        (
            f"zeros_last({one}) -> List[int]",
            "Move all zeros to the end of the list.",
            lambda v: sorted(v, key=lambda x: x == 0),
        ),
        (
            f"odd_last({one}) -> List[int]",
            "Return the even numbers, then the odd ones.",
            lambda v: sorted(v, key=lambda x: x % 2),
        ),
        (
            f"alternate_sum({one}) -> int",
            "Add and subtract the elements in turn.",
            lambda v: sum(v[::2]) - sum(v[1::2]),
        ),
        (
            f"rotate_left({with_k}) -> List[int]",
            "Rotate the list to the left by k positions.",
            lambda v, k: v[k:] + v[:k],
        ),
        (f"k_smallest({with_k}) -> List[int]", "Return the k smallest numbers, sorted.", lambda v, k: sorted(v)[:k]),
        (
            f"without_every_kth({with_k}) -> List[int]",
            "Leave out every k-th element.",
            lambda v, k: [x for i, x in enumerate(v, 1) if i % k],
        ),
        (
            f"repeat_elements({with_k}) -> List[int]",
            "Repeat each element k times.",
            lambda v, k: [x for x in v for _ in range(k)],
        ),
        (
            f"chunks({with_k}) -> list",
            "Split the list into chunks of k elements; the last may be shorter.",
            lambda v, k: [v[i : i + k] for i in range(0, len(v), k)],
        ),
        (
            f"window_sums({with_k}) -> List[int]",
            "Return the sums of all k consecutive elements.",
            lambda v, k: [sum(v[i : i + k]) for i in range(len(v) - k + 1)],
        ),
        (
            f"add_lists({two}) -> List[int]",
            "Add two lists element by element. Missing elements count as zero.",
            lambda a, b: [x + y for x, y in zip_longest(a, b, fillvalue=0)],
        ),
        (
            f"only_in_first({two}) -> List[int]",
            "Return the elements of the first list that are not in the second.",
            lambda a, b: [x for x in a if x not in b],
        ),
        (
            f"dot_product({two}) -> int",
            "Return the sum of the products of elements at equal positions.",
            lambda a, b: sum(map(int.__mul__, a, b)),
        ),
        (
            f"union_sorted({two}) -> List[int]",
            "Return the distinct numbers of both lists, sorted.",
            lambda a, b: sorted({*a, *b}),
        ),
        (
            f"have_same_sum({two}) -> bool",
            "Return True if both lists have the same sum.",
            lambda a, b: sum(a) == sum(b),
        ),
    ]


def composed_functions(seed: int = 0) -> Iterator[str]:
    """Requests without end, each another text."""
    rng, seen = random.Random(seed), set()
    while True:
        k, letter = rng.randint(2, 9), rng.choice("aeonrst")
        kind = rng.choice([_conditional_tasks(rng, k, letter), _number_tasks(k), _list_tasks()])
        if (text := _request(*rng.choice(kind), rng)) not in seen:
            seen.add(text)
            yield text


def _request(signature: str, description: str, solution: Callable[..., Any], rng: random.Random) -> str:
    name, parameters = signature.split("(", 1)[0], PARAMETER.findall(signature.split(" ->")[0])
    examples = []
    for _ in range(rng.randint(0, 4)):
        values = [rng.randint(1, 3) if parameter == "k" else MAKERS[kind](rng) for parameter, kind in parameters]
        try:
            examples.append((f"{name}({', '.join(map(repr, values))})", repr(solution(*values))))
        except (ValueError, IndexError):
            continue  # no element fulfills the condition
    lines = rng.choice(
        [
            [line for call, result in examples for line in (f">>> {call}", result)],
            ["", "Examples:", *(f"{call} == {result}" for call, result in examples)] if examples else [],
            ["For example:", *(f"{call} should return {result}." for call, result in examples)] if examples else [],
        ]
    )
    is_typed = rng.random() < 0.65
    if not is_typed:
        signature = PARAMETER.sub(r"\1", signature.split(" ->")[0])
    imports = "from typing import List\n\n\n" if "List[" in signature else ""
    quotes, opening = rng.choice(['"""', '"""', '"""', "'''"]), rng.choice(["", " ", "\n    "])
    body = "\n".join([opening + description, *(f"    {line}".rstrip() for line in lines)])
    return (
        f"Complete this Python function:\n```python\n{imports}def {signature}:\n    {quotes}{body}\n    {quotes}\n```"
    )
