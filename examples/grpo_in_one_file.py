"""GRPO in one file, to be read from top to bottom: 150 lines instead of a library.

    python examples/grpo_in_one_file.py

It teaches the embedded model to add numbers; a step takes a few seconds. `localrl train` takes the
same gradient (tests/test_grpo_in_one_file.py compares them), in batches, within a memory limit,
with trees, checkpoints and logs. Here every completion is sampled and scored on its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localrl.backend import mx, nn, optim  # mlx; on Linux with a faster BLAS than its own
from localrl.embedded import embedded_model_path

STEPS, PROMPTS, GROUP, MAX_TOKENS = 15, 4, 8, 48
"""Steps; prompts of a step; completions of a prompt; tokens of a completion, at most."""
TEMPERATURE = 1.0
MOST_WEIGHT = 2.0
"""A token counts at most twice, however much likelier it is here than when it was sampled."""
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Group:
    """One prompt with its completions; all of it is token ids, text is only for the reward."""

    prompt: list[int]
    completions: list[list[int]]
    sampled_logprobs: list[np.ndarray]
    """Of each completion's tokens, at the time when they were sampled."""
    rewards: list[float]


def main() -> None:
    """Train for a few steps, and print how many completions were right in each."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    mx.random.seed(0)
    problems = random.Random(0)
    model, tokenizer = load(str(embedded_model_path()))[:2]
    # The base is frozen; only the adapters (LoRA, arXiv 2106.09685) have gradients.
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 16, "scale": 2.0, "dropout": 0.0})
    optimizer = optim.Adam(learning_rate=LEARNING_RATE, bias_correction=True)
    loss_and_gradient = nn.value_and_grad(model, loss)
    for step in range(1, STEPS + 1):
        groups = [sample_group(model, tokenizer, *problem(problems)) for _ in range(PROMPTS)]
        value, gradient = loss_and_gradient(model, groups)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
        right = np.mean([group.rewards for group in groups])
        print(f"step {step:2}  right {right:.2f}  loss {value.item():+.4f}", flush=True)


def problem(rng: random.Random) -> tuple[str, str]:
    """A prompt and its answer: the sum of four two-digit numbers."""
    numbers = [rng.randint(10, 99) for _ in range(4)]
    return "sum " + " ".join(map(str, numbers)), str(sum(numbers))


def reward(text: str, answer: str) -> float:
    """1 for the right number after the last `#`, else 0."""
    return float(text.rpartition("#")[2].strip() == answer)


def sample_group(model: Any, tokenizer: Any, text: str, answer: str) -> Group:
    """Completions of one prompt, drawn from the model as it is now, and their rewards."""
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ends = set(tokenizer.eos_token_ids)
    completions, logprobs, rewards = [], [], []
    for _ in range(GROUP):
        tokens, sampled = sample(model, prompt, ends)
        completions.append(tokens)
        logprobs.append(sampled)
        rewards.append(reward(tokenizer.decode([t for t in tokens if t not in ends]), answer))
    return Group(prompt, completions, logprobs, rewards)


def sample(model: Any, prompt: list[int], ends: set[int]) -> tuple[list[int], np.ndarray]:
    """One completion, its end token included, and the log-probability of each token."""
    from mlx_lm.generate import generate_step

    def draw(logprobs: mx.array) -> mx.array:
        return mx.random.categorical(logprobs / TEMPERATURE)

    tokens, sampled = [], []
    for token, logprobs in generate_step(
        mx.array(prompt), model, sampler=draw, max_tokens=MAX_TOKENS
    ):
        scaled = logprobs.astype(mx.float32) / TEMPERATURE
        tokens.append(int(token))
        sampled.append((scaled[token] - mx.logsumexp(scaled)).item())
        if tokens[-1] in ends:
            break
    return tokens, np.array(sampled, np.float32)


def advantages(rewards: Sequence[float]) -> np.ndarray:
    """Each reward minus the mean of the others (leave-one-out): how much better than its siblings.

    It is unbiased, unlike the mean with itself, and needs no learned critic.
    """
    total, others = sum(rewards), len(rewards) - 1
    return np.array([r - (total - r) / others for r in rewards], np.float32)


def loss(
    model: Any,
    groups: Sequence[Group],
    temperature: float = TEMPERATURE,
    max_tokens: int = MAX_TOKENS,
) -> mx.array:
    """The surrogate of the policy gradient, averaged over completions.

        L = - sum over tokens of w r A / Z,   Z = completions * max_tokens
        w = min(exp(logprob - sampled_logprob), 2), r = exp(logprob - itself), where w and "itself"
            are constants: r is 1 and has the gradient of the logprob.

    w is 1 but for what sampling and training round differently. PPO (arXiv 1707.06347) also clips
    r, which matters when completions serve a second update; here each serves one. Z is a constant,
    so that a long completion is not worth less for each token (Dr. GRPO, arXiv 2503.20783).
    """
    total = mx.array(0.0)
    for group in groups:
        for tokens, sampled, advantage in zip(
            group.completions, group.sampled_logprobs, advantages(group.rewards), strict=True
        ):
            if advantage == 0:  # all alike: nothing to learn, and no forward pass
                continue
            logprobs = token_logprobs(model, group.prompt, tokens, temperature)
            constant = mx.stop_gradient(logprobs)
            weight = mx.minimum(mx.exp(constant - mx.array(sampled)), MOST_WEIGHT)
            total += (weight * mx.exp(logprobs - constant)).sum() * advantage.item()
    return -total / (sum(len(group.completions) for group in groups) * max_tokens)


def token_logprobs(
    model: Any, prompt: list[int], tokens: list[int], temperature: float
) -> mx.array:
    """Log-probability (n,) of each token of a completion: position t predicts token t + 1."""
    ids = mx.array([prompt + tokens])
    logits = model(ids[:, :-1])[0, len(prompt) - 1 :].astype(mx.float32) / temperature
    chosen = mx.take_along_axis(logits, mx.array(tokens)[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)


if __name__ == "__main__":
    main()
