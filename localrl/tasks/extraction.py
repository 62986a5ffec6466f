"""Facts from a few sentences, as a JSON object with given keys.

    prompt  Read this text: Maria Silva lives in Lisbon. Write what it says as one JSON object ...
    answer  {"name": "Maria Silva", "city": "Lisbon"}

The operands are the level, the keys in order, the wordings, and the facts of one or two people.
"""

from __future__ import annotations

import json
from random import Random

from localrl.tasks.base import RewardSpec
from localrl.tasks.family import Operands

NAME = "extraction"
DIFFICULTIES = (1, 2, 3, 4)
REWARD = RewardSpec("json", "localrl.rewards.json_answers:json_reward")

FIRST_NAMES = (
    "Ada", "Boris", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Irene", "Jonas", "Kemal",
    "Laura", "Maria", "Nadia", "Oscar", "Paula", "Rosa", "Samir", "Tessa", "Victor", "Wanda",
)  # fmt: skip
LAST_NAMES = (
    "Adler", "Baker", "Costa", "Dubois", "Evans", "Fischer", "Garcia", "Horvat", "Ivanov", "Jensen",
    "Keller", "Lopez", "Moreau", "Novak", "Okafor", "Petrov", "Rossi", "Silva", "Tanaka", "Weber",
)  # fmt: skip
CITIES = (
    "Athens", "Berlin", "Cairo", "Dublin", "Florence", "Geneva", "Hanoi", "Istanbul", "Jakarta",
    "Kyoto", "Lisbon", "Madrid", "Nairobi", "Oslo", "Prague", "Quito", "Rome", "Seoul", "Vienna",
)  # fmt: skip
JOBS = ("baker", "carpenter", "dentist", "farmer", "judge", "lawyer", "nurse", "pilot", "teacher")
PETS = ("cat", "dog", "hamster", "parrot", "rabbit", "snake", "tortoise")
NUMBERS = ("age",)
"""Keys with numeric values."""

KEYS = {
    1: ("name", "city"),
    2: ("name", "age", "city"),
    3: ("name", "age", "job", "city", "pet"),
    4: ("age", "job", "city", "pet"),
}
"""The requested keys, by level. On level 4 there are two people, one of whom is asked about."""
WORDINGS = {
    1: ("{name} lives in {city}.", "The home of {name} is in {city}.", "In {city} lives {name}."),
    2: (
        "{name} is {age} years old, lives in {city} and works as a {job}.",
        "The {job} {name} from {city} is {age} years old.",
        "In {city} we met a {job} of {age} years, {name}.",
    ),
    3: (
        "{name}, aged {age}, works as a {job} in {city}. At home waits a {pet}.",
        "Our {job} has a {pet} and comes from {city}. The name is {name}, the age {age}.",
        "{age} years old and owner of a {pet}, {name} is a {job}. The family lives in {city}.",
    ),
}
WORDINGS[4] = WORDINGS[3]


def draw(rng: Random, difficulty: int) -> Operands:
    """Draw the operands: level and order of the keys, the wordings, the facts."""
    keys = list(KEYS[difficulty])
    rng.shuffle(keys)
    wording = str(rng.randrange(len(WORDINGS[difficulty])))
    person = _person(rng)
    if difficulty < 4:
        return (str(difficulty), "+".join(keys), wording, *person)
    other = _person(rng)
    while other[0] == person[0]:
        other = _person(rng)
    wording += str(rng.randrange(len(WORDINGS[4]))) + rng.choice("ab")
    return (str(difficulty), "+".join(keys), wording, *person, *other)


def prompt(operands: Operands) -> str:
    """The user's message."""
    keys = [f'"{key}"' + (" (a number)" if key in NUMBERS else "") for key in _keys(operands)]
    about = f" about {_facts(operands[3:8])['name']}" if operands[0] == "4" else ""
    return (
        f"Read this text: {_text(operands)}\nWrite what it says{about} as one JSON object with "
        f"exactly the keys {', '.join(keys[:-1])} and {keys[-1]}, spelled as in the text."
    )


def answer(operands: Operands) -> str:
    """The object, with its keys in the requested order."""
    facts = _facts(operands[3:8])
    return json.dumps({key: facts[key] for key in _keys(operands)})


def held_out_as(operands: Operands) -> tuple[str, Operands]:
    """The hold-out key: the same facts in other words or with other keys are one problem."""
    used = {"name", *KEYS[int(operands[0])]}
    people = [_facts(operands[start : start + 5]) for start in range(3, len(operands), 5)]
    return NAME, tuple(str(facts[key]) for facts in people for key in facts if key in used)


def _person(rng: Random) -> Operands:
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    age = str(rng.randint(18, 80))
    return (name, age, rng.choice(JOBS), rng.choice(CITIES), rng.choice(PETS))


def _facts(person: Operands) -> dict[str, str | int]:
    name, age, job, city, pet = person
    return {"name": name, "age": int(age), "job": job, "city": city, "pet": pet}


def _keys(operands: Operands) -> list[str]:
    return operands[1].split("+")


def _text(operands: Operands) -> str:
    wording, level = operands[2], int(operands[0])
    first = WORDINGS[level][int(wording[0])].format(**_facts(operands[3:8]))
    if level < 4:
        return first
    second = WORDINGS[level][int(wording[1])].format(**_facts(operands[8:]))
    return f"{first} {second}" if wording[2] == "a" else f"{second} {first}"
