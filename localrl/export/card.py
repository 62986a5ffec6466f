"""The model card of a pushed adapter, made only from the `facts` of its run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData

from localrl.export.facts import Facts, HeldOutResult
from localrl.utils.figures import fixed
from localrl.utils.text import sampled_at

TAGS = ("lora", "grpo", "reinforcement-learning", "localrl")
"""Tags of the card. `mlx` is left out: it makes the Hub show commands that fail on an adapter."""
SUPERVISED_TAGS = ("lora", "sft", "localrl")

SETTINGS_NOTE = (
    "`localrl train --print-config` explains each setting; 0 often means that localrl chooses."
)

WIDTH, HEIGHT = 60, 8
SAMPLE_LIMIT = 2000
"""Maximum number of characters shown of a prompt or completion."""


@dataclass(frozen=True)
class Sample:
    """A rollout that its owner chose to publish."""

    prompt: str
    completion: str
    reward: float | None


@dataclass(frozen=True)
class Address:
    """The repository of an adapter and the base model it belongs to."""

    repo_id: str
    base_id: str
    """Hub id of the unquantised model."""
    peft_left_out: str | None
    """Reason there are no PEFT weights; None if there are."""


def make_card(facts: Facts, address: Address, samples: Sequence[Sample] = ()) -> str:
    """Format the repository's README.md: the Hub's metadata, then Markdown."""
    results = _results(facts)
    data = ModelCardData(
        base_model=address.base_id,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=list(SUPERVISED_TAGS if facts.supervised else TAGS),
        model_name=_name(address) if results else None,
        eval_results=results or None,
    )
    body = "\n\n".join(_sections(facts, address, samples))
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _name(address: Address) -> str:
    return address.repo_id.partition("/")[2]


def _results(facts: Facts) -> list[EvalResult]:
    if facts.adapter is None or facts.adapter.pass_at_1 is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="localrl",
            dataset_name=facts.task,
            metric_type="pass@1",
            metric_value=round(facts.adapter.pass_at_1, 4),
        )
    ]


def _sections(facts: Facts, address: Address, samples: Sequence[Sample]) -> Iterator[str]:
    base = address.base_id
    yield f"# {_name(address)}"
    how = "on worked examples" if facts.supervised else "by reinforcement learning"
    yield (
        f"A LoRA adapter for [{base}](https://huggingface.co/{base}), trained on that model or a "
        f"quantised copy {how} with localrl on one machine."
    )
    if facts.embedded:
        yield (
            "It was trained on the small model that ships with localrl. Whoever pushed this "
            "states that the base model named above is the same model."
        )
    if facts.unsafe_code:
        yield (
            "**Code from answers ran without a sandbox in this training run** "
            "(`task.unsafe_code`): it could do anything its user can do."
        )
    yield _usage(address)
    yield "## What it learned"
    yield _learned(facts)
    yield _evaluation(facts)
    if facts.curve:
        yield _curve(facts.curve)
    if samples:
        yield "## Samples\n\nFrom the last step of training.\n\n" + "\n\n".join(
            map(_sample, samples)
        )
    yield f"## Settings\n\n{SETTINGS_NOTE}\n\n" + _table(("setting", "value"), facts.settings)
    yield _memory(facts)
    yield "## Versions\n\n" + _table(("package", "version"), facts.versions)
    yield _limits(facts, address)


def _usage(address: Address) -> str:
    name, base = _name(address), address.base_id
    text = (
        "## Use\n\nWith mlx-lm, which loads adapters only from a local folder:\n\n"
        f"```bash\nhf download {address.repo_id} --local-dir {name}\n"
        f'mlx_lm.generate --model {base} --adapter-path {name} --prompt "your prompt"\n```'
    )
    if address.peft_left_out is not None:
        return f"{text}\n\nThere are no weights in PEFT format: {address.peft_left_out}."
    return (
        f"{text}\n\nWith PEFT:\n\n```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{address.repo_id}")\n```'
    )


def _learned(facts: Facts) -> str:
    rewards = "; ".join(facts.rewards) or "the task's own"
    about = f", built into localrl: {facts.about}" if facts.about else ""
    task = f"- Task: {facts.task}{about}\n- Reward: {rewards}"
    if not facts.supervised:
        return task
    given = "- Worked examples: own data; only the assistant's tokens were learned"
    return f"{given}\n- Measured by:\n\n{task}" if facts.about else given


def _evaluation(facts: Facts) -> str:
    known = facts.adapter or facts.base
    if known is None:
        return "## Evaluation\n\nThis run was not evaluated."
    if facts.supervised and not known.n:
        losses = [side.loss for side in (facts.base, facts.adapter) if side is not None]
        told = ", ".join(map(_number, losses))
        return (
            "## Evaluation\n\nLoss per token of held-out worked examples, before and after: "
            f"{told}. Nothing was sampled."
        )
    rows = [_side("base", facts.base), _side("with the adapter", facts.adapter)]
    return (
        "## Evaluation\n\nOn the same held-out prompts before and after; one completion each, "
        f"{sampled_at(known.temperature)}. pass@1 is the share with a first reward of 1 or more, "
        "with its 95 % Wilson interval.\n\n"
        "| | prompts | pass@1 | 95 % interval | mean reward |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
    )


def _side(name: str, side: HeldOutResult | None) -> str:
    if side is None:
        return f"| {name} | unknown | unknown | unknown | unknown |"
    low, high = side.ci95 or (None, None)
    n = "unknown" if side.n is None else side.n
    interval = f"{_number(low)} to {_number(high)}"
    return (
        f"| {name} | {n} | {_number(side.pass_at_1)} | {interval} | {_number(side.mean_reward)} |"
    )


def _curve(rewards: Sequence[float]) -> str:
    each = -(-len(rewards) // WIDTH)
    means = "" if each == 1 else f"; each column is the mean of {each} steps"
    return (
        f"## Training\n\nMean reward of {len(rewards)} steps{means}.\n\n"
        f"```text\n{plot(rewards, each)}\n```"
    )


def plot(values: Sequence[float], each: int = 1) -> str:
    """Draw a text column chart from the lowest value to the highest, `each` values per column."""
    parts = [values[i : i + each] for i in range(0, len(values), each)]
    columns = [sum(part) / len(part) for part in parts]
    low, high = min(columns), max(columns)
    step = (high - low) / HEIGHT or 1.0
    levels = [round((column - low) / step) for column in columns]
    lines = []
    for row in range(HEIGHT, -1, -1):
        label = f"{fixed(low + row * step):>8}" if row in (0, HEIGHT) else " " * 8
        lines.append(f"{label} |" + "".join("#" if level >= row else " " for level in levels))
    return "\n".join(line.rstrip() for line in lines)


def _sample(sample: Sample) -> str:
    reward = "none" if sample.reward is None else f"{sample.reward:g}"
    return f"Prompt:\n\n{fence(sample.prompt)}\n\nReward {reward}:\n\n{fence(sample.completion)}"


def fence(text: str) -> str:
    """Fence the text with more backticks than it contains, so nothing in it ends the block."""
    text = text if len(text) <= SAMPLE_LIMIT else text[:SAMPLE_LIMIT] + " [...]"
    marks = "```"
    while marks in text:
        marks += "`"
    return f"{marks}text\n{text}\n{marks}"


def _memory(facts: Facts) -> str:
    peak = "unknown" if facts.peak_bytes is None else f"{facts.peak_bytes / 2**20:.0f} MiB"
    return f"## Memory\n\nPeak memory held by MLX: {peak}. The plan:\n\n" + _table(
        ("planned", "value"), facts.plan
    )


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| `{key}` | {value} |" for key, value in rows.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _limits(facts: Facts, address: Address) -> str:
    what = "learned from examples of one kind" if facts.supervised else "was rewarded for one task"
    limits = [
        f"It {what}; its behaviour on others was not measured.",
        "The held-out prompts come from the same source as the training prompts.",
        "LM Studio, oMLX and Ollama cannot load an adapter folder: they need a fused model, which "
        "`localrl export --fused` writes.",
        f"The licence of {address.base_id} applies to derived models.",
    ]
    if facts.adapter is None:
        limits.insert(0, "It was not evaluated.")
    return "## Known limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _number(value: float | None) -> str:
    return "unknown" if value is None else fixed(value)
