"""Chat requests that are composed of parts: forms such as "Explain ... to ...", filled with topics.

`prepare_prompts.py --requests N` writes N of them. They ask for what people ask a chat model for (texts, explanations,
comparisons, plans, roles, small programs, small puzzles), in first turns of one or two sentences.
"""

import random
from collections.abc import Iterator


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split("|")]


# What a field of a form may be.
PARTS = {
    "scene": _parts(
        "a trip to Japan | the first day at a new job | a lost dog that finds its way home | an old lighthouse | "
        "a meeting of two old friends | a robot that learns to paint | a long train ride | a family dinner | "
        "a mysterious letter | a chess tournament | a haunted hotel | the city at night | a journey to the moon | "
        "a forgotten song | the ocean | the four seasons | a mountain hike | a power outage | the first snow | "
        "a garden in spring | a music festival | moving to a new city | a broken watch | the northern lights | "
        "a cooking class | a startup that fails | electric cars | public libraries | time management | coffee"
    ),
    "concept": _parts(
        "photosynthesis | gravity | black holes | the water cycle | plate tectonics | natural selection | entropy | "
        "the immune system | quantum entanglement | supply and demand | inflation | compound interest | encryption | "
        "machine learning | neural networks | blockchain | databases | recursion | sorting algorithms | magnetism | "
        "the greenhouse effect | acids and bases | the periodic table | electric circuits | nuclear fusion | "
        "relativity | vaccines | antibiotics | batteries | cell division | enzymes | osmosis | ocean currents | "
        "earthquakes | tides | probability | the central limit theorem | derivatives | matrices | prime numbers | "
        "game theory | the placebo effect | cognitive dissonance | federalism | globalization | stoicism"
    ),
    "pair": _parts(
        "weather and climate | mitosis and meiosis | RNA and DNA | speed and velocity | mass and weight | "
        "a virus and a bacterium | TCP and UDP | a list and a tuple in Python | "
        "supervised and unsupervised learning | a stack and a queue | "
        "a monopoly and an oligopoly | fiscal and monetary policy | a comet and an asteroid | "
        "correlation and causation | a stock and a bond | active and passive voice | a metaphor and a simile | "
        "deductive and inductive reasoning | a compiler and an interpreter | latitude and longitude | plants and fungi"
    ),
    "event": _parts(
        "the French Revolution | World War I | the fall of the Roman Empire | the Industrial Revolution | "
        "the Great Depression | the Cold War | the Renaissance | the Reformation | the Silk Road | the Black Death | "
        "the Space Race | the invention of the printing press | the Enlightenment | the fall of the Berlin Wall | "
        "the Meiji Restoration | the women's suffrage movement | the Gold Rush | the Congress of Vienna"
    ),
    "role": _parts(
        "a pirate captain | a medieval knight | a strict teacher | a friendly tour guide | a detective | "
        "a time traveler | a doctor | a chef in Italy | a football coach | a wise old wizard | a news reporter | "
        "a career advisor | an astronaut | a librarian | a cat | a museum guide | a politician | a game show host"
    ),
    "reader": _parts(
        "a five-year-old child | a high school student | a beginner | a busy manager | an expert | a curious friend | "
        "a class of students | a foreign visitor"
    ),
    "text": _parts(
        "short story | poem | blog post | short essay | speech | letter | dialogue | song | newspaper article | "
        "diary entry | fairy tale | travel report | review"
    ),
    "tone": _parts("captivating | vivid | funny | sad | persuasive | lively"),
    "goal": _parts(
        "save money | learn to play the guitar | prepare for a job interview | sleep better | write a resume | "
        "train for a marathon | cook for a large family | plan a wedding | start a podcast | grow tomatoes | "
        "learn Spanish | reduce stress | study for exams | make new friends | give a presentation | buy a used car | "
        "start a small business | raise a puppy | write a novel | remember names | manage a team | negotiate a salary"
    ),
    "issue": _parts(
        "remote work | school uniforms | nuclear power | social media | artificial intelligence | zoos | homework | "
        "online learning | tourism | a four-day work week | universal basic income | genetic engineering | "
        "space exploration | fast food | video games | standardized tests | electric scooters | living in a big city"
    ),
    "task": _parts(
        "check whether a string is a palindrome | count the words in a text file | "
        "find the largest number in a list | reverse a linked list | "
        "compute Fibonacci numbers | sort a list of names | remove duplicates from a list | "
        "find all prime numbers up to n | merge two sorted lists | generate a random password | "
        "implement binary search | simulate rolling dice | read a CSV file and print its columns | count vowels | "
        "find the longest word in a sentence | implement a stack | parse a date | draw a multiplication table"
    ),
    "language": _parts("Python | JavaScript | C++ | Java | SQL | Go"),
    "person": _parts("my boss | a customer | my landlord | a professor | my team | an old friend | a hotel | my bank"),
    "wish": _parts(
        "a day off | feedback on my report | a refund | a meeting next week | more time for a project | "
        "help with moving | a recommendation letter | a change of the schedule | support for a local event"
    ),
    "count": _parts("three | four | five | six | seven | ten"),
    "wanted": _parts("books | films | cities | inventions | scientists | animals | foods | hobbies"),
    "shop": _parts("bakery | book shop | startup | cat | band | podcast | café"),
    "place": _parts("character | strange city | perfect day | dangerous animal | secret place | busy street"),
    "word": _parts("apple | table | pear | banana | car | bicycle | dog | cat | violin | hammer | rose | tulip"),
    "name": _parts("Alice | Ben | Clara | David | Emma | Frank | Grace | Henry | Isabel | Jack | Kate | Leo | Mia"),
    "small": [str(number) for number in range(3, 13)],
    "number": [str(number) for number in range(14, 60)],
}
FORMS = [
    "Write a {text} about {scene}.",
    "Compose a {tone} {text} about {scene}.",
    "Write the first paragraph of a {text} that ends with {scene}.",
    "Draft an email to {person} asking for {wish}.",
    "Help me write a polite message to {person} about {wish}.",
    "Explain {concept} to {reader}.",
    "What is meant by {concept}, and why does it matter?",
    "Describe {concept} and name {count} applications or examples.",
    "What is the difference between {pair}?",
    "Compare {pair}.",
    "What were the main causes and consequences of {event}?",
    "How did {event} change society?",
    "Give a timeline of {event} with {count} important dates.",
    "Summarize {event} for {reader}.",
    "Imagine you are {role}. Tell me what you think about {issue}.",
    "Act as {role}. A visitor asks you how to {goal}. What do you say?",
    "Pretend to be {role} and describe {scene}.",
    "Give me {count} tips to {goal}.",
    "How can I {goal}?",
    "Create a plan for thirty days to {goal}.",
    "What are common mistakes when people try to {goal}?",
    "What are the advantages and disadvantages of {issue}?",
    "Discuss the effects of {issue} on young people.",
    "Write an argument against {issue}.",
    "Write a {language} program to {task}.",
    "Implement a function in {language} to {task}. Explain how it works.",
    "{name} is older than {name}, and {name} is younger than both. Who is the oldest? Explain your reasoning.",
    "{name} has {number} marbles and gives {small} of them to {name}. How many are left?",
    "A train covers {number}0 kilometers in {small} hours. What is its average speed?",
    "Solve for x: {small}x + {small} = {number}.",
    "If a rectangle is {number} meters long and {small} meters wide, what are its area and perimeter?",
    "Which word does not belong with the others: {word}, {word}, {word}, {word}? Why?",
    "Extract names and numbers from this text: {name} bought {number} books, and {name} sold {small} paintings.",
    "Correct the grammar: {name} don't knows where {name} have went yesterday, but they was late.",
    "List {count} {wanted} that everyone should know, with a sentence about each.",
    "Suggest {count} names for a {shop} and explain them.",
    "Develop an outline for a lecture about {concept}.",
    "Describe a {place} in a few sentences.",
]
ENDINGS = ["", "", "", " Keep it short.", " Use simple language.", " Give examples.", " Use at most 200 words."]


class _Fields(dict[str, str]):
    """A random part for each field; two fields of one form differ."""

    def __init__(self, rng: random.Random):
        super().__init__()
        self._rng, self._used = rng, set[str]()

    def __missing__(self, name: str) -> str:
        part = self._rng.choice([part for part in PARTS[name] if part not in self._used])
        self._used.add(part)
        return part


def composed_requests(seed: int = 0) -> Iterator[str]:
    """Endless requests in random order, none twice."""
    rng, seen = random.Random(seed), set[str]()
    while True:
        request = rng.choice(FORMS).format_map(_Fields(rng)) + rng.choice(ENDINGS)
        if request not in seen:
            seen.add(request)
            yield request
