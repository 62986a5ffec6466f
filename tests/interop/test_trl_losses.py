"""Objectives beside TRL's own loss on equal numbers: policy, first pass, sampler, rewards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl_trainer
from datasets import Dataset
from forests import scored
from steps import LMAX, ragged_group, selection
from trl import GRPOConfig, GRPOTrainer

from localrl.backend import mx
from localrl.learning.objective import MOST_CORRECTION, policy_sums
from localrl.learning.objectives import OBJECTIVES

LENGTHS = (5, 2, 9, 6)
REWARDS = (1.0, 0.0, 0.25, 0.0)
ROWS = np.repeat(np.arange(4), LENGTHS)
THEIRS: dict[str, dict[str, Any]] = {
    # The name is localrl's; TRL has this mixture as settings.
    "clipped": {"loss_type": "dr_grpo", "epsilon_high": 0.28},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
}
"""TRL's settings for each objective that it has, see docs/papers.md."""


def draw(later: bool, rounded: bool) -> list[np.ndarray]:
    """(new, first, sampler): log-probabilities (N,) of all tokens, unequal as said."""
    draws = np.random.default_rng(0)
    new = draws.uniform(-3, -0.1, len(ROWS))
    first = new - draws.normal(0, 0.3, len(ROWS)) * later
    if later:  # two completions within gspo's narrow range, and two outside
        for row in (0, 1):
            first[row == ROWS] += (new - first)[row == ROWS].mean() + 1e-4
    sampler = first - draws.normal(0, 0.5, len(ROWS)) * rounded
    return [values.astype(np.float32) for values in (new, first, sampler)]


def advantages(name: str) -> np.ndarray:
    rewards = np.array(REWARDS)
    if OBJECTIVES[name].prompt_weight == "none":
        return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
    centred = rewards - rewards.mean()
    return centred / (rewards.std(ddof=1) + 1e-4) if name != "dr_grpo" else centred


def ours(name: str, new: np.ndarray, first: np.ndarray, sampler: np.ndarray) -> tuple[float, Any]:
    """(loss, its derivative by each log-probability)."""
    batch = selection(OBJECTIVES[name], [scored(ragged_group(LENGTHS), REWARDS)]).batch
    coefficients = mx.array(np.concatenate([node.coefficients for node in batch.nodes]))

    def loss(logprobs: mx.array) -> mx.array:
        known = (mx.array(first), mx.array(sampler), coefficients)
        return policy_sums(OBJECTIVES[name], logprobs, *known, ROWS).loss / batch.z

    value, slope = mx.value_and_grad(loss)(mx.array(new))
    return value.item(), np.array(slope)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trl_trainer._make_model(tmp_path_factory.mktemp("losses") / "model")


def trainer(folder: Path, name: str) -> GRPOTrainer:
    """Their trainer with these settings, told that its tokens came from another engine."""
    settings = GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=LMAX,
        report_to=[],
        **THEIRS[name],
    )
    made = GRPOTrainer(
        model=str(folder),
        processing_class=trl_trainer.make_tokenizer(),
        reward_funcs=[lambda completions, **columns: [0.0] * len(completions)],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 4),
    )
    made.model.eval()  # the loss is then not divided by the number of accumulated batches
    made.use_vllm = made.vllm_importance_sampling_correction = True
    return made


def square(values: Sequence[float]) -> torch.Tensor:
    """The completions' tokens as rows (4, T), padded with 0."""
    found = torch.zeros(len(LENGTHS), max(LENGTHS))
    for row in range(len(LENGTHS)):
        found[row, : LENGTHS[row]] = torch.tensor(np.asarray(values)[row == ROWS])
    return found


def theirs(folder: Path, name: str, new: Any, first: Any, sampler: Any) -> tuple[float, Any]:
    mask = square(np.ones(len(ROWS)))
    logps = square(new).requires_grad_()
    made = trainer(folder, name)
    made._get_per_token_logps_and_entropies = lambda *given, **named: (logps, mask * 0, None)
    loss = made._compute_loss(
        made.model,
        {
            "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
            "prompt_mask": torch.ones(4, 1, dtype=torch.long),
            "completion_ids": torch.zeros(4, max(LENGTHS), dtype=torch.long),
            "completion_mask": mask,
            "advantages": torch.tensor(advantages(name), dtype=torch.float32),
            "old_per_token_logps": square(first),
            # token_truncate, in the words of `_generate_and_score_completions`
            "importance_sampling_ratio": torch.clamp(
                torch.exp((square(first) - square(sampler)) * mask), max=MOST_CORRECTION
            ),
            "num_items_in_batch": mask.sum(),
        },
    )
    loss.backward()
    return loss.item(), logps.grad[mask.bool()].numpy()


@pytest.mark.parametrize("later", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "16 bits"])
@pytest.mark.parametrize("name", THEIRS)
def test_loss_and_gradient_equal_theirs(
    folder: Path, name: str, later: bool, rounded: bool
) -> None:
    numbers = draw(later, rounded)
    value, slope = ours(name, *numbers)
    expected, their_slope = theirs(folder, name, *numbers)
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(slope, their_slope, rtol=1e-4, atol=1e-7)
    assert np.abs(their_slope).max() > 1e-4
    if later and name != "cispo":
        assert (their_slope == 0).any()  # some of the ratios are outside the range
