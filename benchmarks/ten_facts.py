"""Ten facts from a text as one JSON object, of about 80 tokens as SmolLM2-135M indents it.

The data of a task; its reward is examples/smollm2/rewards.py:facts, the share of facts that are
right. Every answer begins with `BEGUN`, which the model continues.
"""

from random import Random

FACTS = {
    "name": (
        "Ada Adler", "David Costa", "Grace Evans", "Hugo Garcia", "Laura Jensen", "Maria Lopez",
        "Oscar Keller", "Paula Novak", "Rosa Silva", "Samir Weber", "Victor Rossi",
    ),
    "age": tuple(range(18, 81)),
    "job": ("baker", "carpenter", "dentist", "farmer", "judge", "lawyer", "nurse", "teacher"),
    "city": ("Athens", "Berlin", "Cairo", "Dublin", "Lisbon", "Madrid", "Oslo", "Rome", "Vienna"),
    "pet": ("cat", "dog", "hamster", "parrot", "rabbit", "snake"),
    "color": ("red", "blue", "green", "black", "white", "yellow"),
    "instrument": ("piano", "violin", "guitar", "flute", "harp"),
    "sport": ("tennis", "football", "chess", "golf", "hockey"),
    "drink": ("tea", "coffee", "milk", "juice", "water"),
    "month": ("January", "March", "April", "June", "July", "August", "October", "December"),
}  # fmt: skip
TEXT = (
    "{name} is {age} years old and works as a {job} in {city}. At home waits a {pet}."
    " The house is {color}. In the evening {name} plays the {instrument} and on Sundays {sport}."
    " The best drink is {drink}, and the birthday is in {month}."
)
BEGUN = '{\n  "name":'
"""What the answer begins with; else most of the base model's begin with a code block."""
ROWS = 800


def examples():
    """Return the rows, all different."""
    rng = Random(0)
    drawn = [tuple(rng.choice(values) for values in FACTS.values()) for _ in range(ROWS)]
    return [row(dict(zip(FACTS, values, strict=True))) for values in dict.fromkeys(drawn)]


def row(facts):
    """Return one person's row."""
    keys = ['"age" (a number)' if key == "age" else f'"{key}"' for key in FACTS]
    question = (
        f"Read this text: {TEXT.format(**facts)}\nWrite what it says as one JSON object"
        f" with exactly the keys {', '.join(keys[:-1])} and {keys[-1]}, spelled as in the text."
    )
    asked, begun = {"role": "user", "content": question}, {"role": "assistant", "content": BEGUN}
    return {"prompt": [asked, begun], "answer": facts}
