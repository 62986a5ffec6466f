"""What a task is: a source of examples, held-out examples, and the rewards that judge answers."""

from __future__ import annotations

from typing import Protocol

from localrl.records import Example, RewardSpec


class Task(Protocol):
    """A source of problems; everything it returns is a function of its name and its arguments."""

    @property
    def name(self) -> str:
        """What a person writes after `--task`."""
        ...

    @property
    def description(self) -> str:
        """One line for a person."""
        ...

    @property
    def rewards(self) -> tuple[RewardSpec, ...]:
        """The parts of the reward, with their weights."""
        ...

    @property
    def environment(self) -> str | None:
        """What completions talk to, as `module:Name`; None when they are one turn."""
        ...

    @property
    def train_size(self) -> int:
        """Number of training examples; 0 means endless."""
        ...

    def train(self, index: int) -> Example:
        """Training example `index`, from 0 to `train_size` - 1, or any from 0 when endless."""
        ...

    def evaluation(self, n: int) -> list[Example]:
        """The first `n` of one fixed list of held-out examples, the same for every run and seed."""
        ...
