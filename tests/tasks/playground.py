"""Environments and tools as users write them, well and badly; run in the worker's child."""

from __future__ import annotations

import os
import time


class Countdown:
    """Plays in text: counts down from the row's number, and is won by saying stop at zero."""

    def reset(self, start: int, **row):
        self.left, self.won = start, False
        return f" from {start}"

    def step(self, text):
        self.won = text.strip() == "stop" and self.left == 0
        if text.strip() == "stop":
            return None
        self.left -= 1
        return str(self.left)

    def get_reward(self):
        return float(self.won)


class Torn:
    """Says halves of characters, and two that belong together."""

    def reset(self, **row):
        return "\udc80"

    def step(self, text):
        return "\ud83d" + chr(0xD83D) + chr(0xDE00)


class Shop:
    """Offers tools, as TRL's environment_factory expects it."""

    def __init__(self):
        self._sold = []

    def reset(self, **row):
        self._sold.clear()

    def buy(self, item: str, count: int = 1) -> str:
        """
        Buy something.

        Args:
            item: What to buy.
            count: How many of it.
        """
        self._sold += [item] * count
        return f"{len(self._sold)} in the basket"

    async def price(self, item: str) -> float:
        """
        Ask what something costs.

        Args:
            item: What to ask for.
        """
        return len(item) / 2

    def get_reward(self):
        return float(len(self._sold))

    def _helper(self):
        raise AssertionError("not a tool")


BOTH = {"shop": Shop, "countdown": Countdown}


def multiply(a: int, b: int) -> int:
    """
    Multiply two integers.

    Args:
        a: The first one.
        b: The second one.

    Returns:
        The product.
    """
    return a * b


def divide(a: int, b: int) -> float:
    """
    Divide one integer by another.

    Args:
        a: What to divide.
        b: By what.
    """
    return a / b


def sleep() -> str:
    """Do nothing for a long time."""
    try:
        time.sleep(600)
    except Exception:
        return "not caught: what ends a tool is no Exception"
    return "slept"


def spin() -> str:
    """Never come back."""
    while True:
        pass


def leave() -> str:
    """End the process."""
    os._exit(3)


class Whims(Countdown):
    """Says something else each time it is reset."""

    made = 0

    def reset(self, **row):
        Whims.made += 1
        return f" number {Whims.made}"


class Fragile(Countdown):
    def step(self, text):
        if self.left == 3:
            raise KeyError("three")
        return super().step(text)


class Mute:
    def reset(self, **row):
        return None


class NoReset:
    def step(self, text):
        return text


def rewards_left(completions, environments, **columns):
    """A reward function that looks at the environments, as TRL lets it."""
    return [float(environment.left) for environment in environments]


class Silent(Countdown):
    get_reward = None


def length(completions, **columns):
    """A reward function that sees whole conversations."""
    return [float(sum(len(m["content"]) for m in completion)) for completion in completions]
