"""Let the model that talks in turns talk on held-out problems and write its card from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# First, since it prepares the process for MLX.
from check_steps import count_parameters, load_float, percent, table

# isort: split
import numpy as np
from talks import CALL_RATE, HEED_RATE

from localrl.engines.open import make_policy
from localrl.policy.model import Policy, load_model
from localrl.records import Example
from localrl.rewards.accuracy import accuracy_reward
from localrl.rollouts.batch import TreeRequest
from localrl.rollouts.decode import Decoder
from localrl.tasks.builtin import load_task
from localrl.tasks.calculator_tool import Calculator
from localrl.tasks.guessing import Guess, stated_guess

GAMES, PRODUCTS = 768, 1024
ROWS = 128
TURNS = 4
MAX_TOKENS = 24
"""Of one turn."""
HEED, CALL = "{low} to ", "<tool_call>"
"""How a first turn begins that does what wins."""

Message = dict[str, str]


@dataclass
class Talk:
    """A conversation with its environment while it goes on."""

    example: Example
    environment: Any
    ids: list[int]
    turns: list[str] = field(default_factory=list)
    """What the model wrote, turn by turn."""
    written: int = 0
    """Tokens that the model wrote."""

    @property
    def able(self) -> bool:
        """Whether its first turn does what wins: writes down the range, or calls the tool."""
        return " to " in self.turns[0] or self.turns[0].startswith(CALL)

    @property
    def right(self) -> bool:
        """Whether it found the number, or said the product in the end."""
        if isinstance(self.environment, Guess):
            return self.environment.get_reward() == 1.0
        return accuracy_reward([self.turns[-1]], answer=[self.example.answer]) == [1.0]

    def heeds(self) -> list[bool]:
        """Of every guess after the first: whether the answers so far left it over."""
        low, high = self.example.columns["low"], self.example.columns["high"]
        number, kept = int(self.example.answer), []
        for text in self.turns:
            guess = stated_guess(text)
            kept.append(guess is not None and low <= guess <= high)
            if guess is not None and guess < number:
                low = max(low, guess + 1)
            elif guess is not None:
                high = min(high, guess - 1)
        return kept[1:]


def load_policy(folder: Path) -> Policy:
    """The model in the folder, its adapters fresh, so that they change nothing."""
    return make_policy(load_model(folder), rank=1, scale=1.0, seed=0, for_cpu=True, dense=True)


def talk(
    policy: Policy,
    examples: Sequence[Example],
    *,
    seed: int,
    temperature: float = 1.0,
    begins: str = "",
    turns: int = TURNS,
) -> list[Talk]:
    """One conversation for each example of one task; first turns start with `begins`."""
    environment = Guess if "low" in examples[0].columns else Calculator
    talks = []
    for example in examples:
        talks.append(Talk(example, environment(), list(policy.tokenizer.encode(example.messages))))
        talks[-1].environment.reset(answer=example.answer, **example.columns)
    decoder, going = Decoder(policy, temperature, ROWS), talks
    for turn in range(turns):
        going = one_turn(decoder, going, (seed, turn), begins if turn == 0 else "")
    return talks


def one_turn(
    decoder: Decoder, talks: list[Talk], address: tuple[int, int], begins: str
) -> list[Talk]:
    """Let each write a turn and hear the answer; those that are answered go on."""
    tokenizer = decoder.policy.tokenizer
    starts = [begins.format(**each.example.columns) for each in talks]
    prompts = [
        each.ids + list(tokenizer.encode_text(start))
        for each, start in zip(talks, starts, strict=True)
    ]
    requests = [
        TreeRequest(i, (*address, each.example.id), 1, 1, MAX_TOKENS)
        for i, each in enumerate(talks)
    ]
    going = []
    segments = decoder.decode(prompts, requests)
    for each, start, segment in zip(talks, starts, segments, strict=True):
        ids = segment.token_ids.tolist()
        text = start + tokenizer.decode(ids[:-1] if segment.end == "stop" else ids)
        each.turns.append(text)
        each.written += len(ids)
        message = reply(each.environment, text, tokenizer.inner) if segment.end == "stop" else None
        if message is not None:
            each.ids = [*prompts[segment.tree], *ids, *tokenizer.encode([message])]
            going.append(each)
    return going


def reply(environment: Any, text: str, tokenizer: Any) -> Message | None:
    """What the environment says to a turn; None when nothing follows."""
    if isinstance(environment, Guess):
        said = environment.step(text)
        return None if said is None else {"role": "user", "content": said}
    _, start, call = text.partition(tokenizer.tool_call_start)
    call, end, _ = call.partition(tokenizer.tool_call_end)
    if not start or not end:
        return None
    try:
        arguments = tokenizer.tool_parser(call)["arguments"]
        return {"role": "tool", "content": environment.calculate(**arguments)}
    except (ValueError, KeyError, TypeError) as error:  # no JSON, or not these arguments
        return {"role": "tool", "content": str(error)}


def share(flags: Sequence[bool]) -> str:
    """How many of them are true."""
    return percent(float(np.mean(flags))) if len(flags) else "none"


def by_level(head: str, talks: Sequence[Talk], able: Sequence[Talk]) -> str:
    """Conversations that end right, by level; `able` were begun with what wins."""
    levels = sorted({t.example.columns["difficulty"] for t in talks})
    rows = []
    for level in [*levels, "all"]:
        groups = [
            [t.right for t in group if level in (t.example.columns["difficulty"], "all")]
            for group in (talks, able)
        ]
        rows.append([level, len(groups[0]), *map(share, groups)])
    return table(["level", "problems", head, f"{head}, begun with what wins"], rows)


def measure_guessing(policy: Policy) -> dict[str, str]:
    """What the card says of guessing."""
    examples = load_task("guessing", train_prompts=0).evaluation(GAMES)
    talks = talk(policy, examples, seed=1)
    able = talk(policy, examples, seed=2, begins=HEED)
    turns = [(t.example.columns, stated_guess(text)) for t in talks for text in t.turns]
    strays = [g for c, g in turns if g is None or not c["low"] <= g <= c["high"]]
    return {
        "games": f"{GAMES}",
        "found": share([t.right for t in talks]),
        "found_tokens": f"{np.mean([t.written for t in talks]):.1f}",
        "heeding": share([t.able for t in talks]),
        "found_heeding": share([t.right for t in talks if t.able]),
        "found_blind": share([t.right for t in talks if not t.able]),
        "found_levels": by_level("found", talks, able),
        "heeded_blind": share([h for t in talks if not t.able for h in t.heeds()]),
        "heeded": share([h for t in able for h in t.heeds()]),
        "guesses": f"{len(turns)}",
        "strays": f"{len(strays)}",
    }


def measure_calculator(policy: Policy) -> dict[str, str]:
    """What the card says of the calculator."""
    examples = load_task("calculator", train_prompts=0).evaluation(PRODUCTS)
    talks = talk(policy, examples, seed=3)
    able = talk(policy, examples, seed=4, begins=CALL)
    return {
        "products": f"{PRODUCTS}",
        "right": share([t.right for t in talks]),
        "called": share([t.able for t in talks]),
        "right_called": share([t.right for t in talks if t.able]),
        "right_else": share([t.right for t in talks if not t.able]),
        "able": share([t.right for t in able]),
        "right_levels": by_level("right", talks, able),
    }


def measure(folder: Path) -> str:
    """Let the model in `folder` talk and return its card."""
    policy = load_policy(folder)
    files = [f for f in folder.iterdir() if f.name != "README.md"]
    template = (Path(__file__).parent / "turns_card.md").read_text()
    card = template.format(
        name=folder.name.removesuffix(".new"),
        parameters=f"{count_parameters(load_float(folder)[0]):,}",
        kilobytes=round(sum(f.stat().st_size for f in files) / 1000),
        heed_rate=percent(HEED_RATE),
        call_rate=percent(CALL_RATE),
        turns=TURNS,
        **measure_guessing(policy),
        **measure_calculator(policy),
    )
    print(card)
    return card
