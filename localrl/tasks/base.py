"""The interface of a task: training examples, held-out examples, and the rewards for answers."""

from __future__ import annotations

from typing import Protocol

from localrl.records import Example, RewardSpec


class Task(Protocol):
    """A source of problems; everything it returns depends only on its name and arguments."""

    @property
    def name(self) -> str:
        """The name that a user passes to `--task`."""
        ...

    @property
    def description(self) -> str:
        """One-line description for users."""
        ...

    @property
    def rewards(self) -> tuple[RewardSpec, ...]:
        """The reward functions, with their weights."""
        ...

    @property
    def environment(self) -> str | None:
        """The environment of completions, as `module:Name`; None if they have one turn."""
        ...

    @property
    def train_size(self) -> int:
        """Number of training examples; 0 if endless."""
        ...

    def train(self, index: int) -> Example:
        """Training example `index`, from 0 to `train_size` - 1, or any from 0 if endless."""
        ...

    def evaluation(self, n: int) -> list[Example]:
        """The first `n` of a fixed list of held-out examples, the same for every run and seed."""
        ...
