"""Unsloth's GRPO on MLX, on the job of all runners.

Its MLX path is for Apple Silicon; elsewhere its question for the platform is answered that way,
after which it runs on MLX's CPU backend.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile

from common import (
    LAYERS,
    SCALE,
    Reached,
    Record,
    count_calls,
    read_job,
    rows,
    score,
    take,
    versions,
)


def import_unsloth() -> None:
    """Import it, on a Mac or not."""
    os.environ["UNSLOTH_IS_PRESENT"] = "1"
    kept = platform.system, platform.machine
    if sys.platform != "darwin":
        platform.system, platform.machine = (lambda: "Darwin"), (lambda: "arm64")
    import unsloth_zoo  # noqa: F401

    platform.system, platform.machine = kept


def main() -> None:
    """Train: a step ends when the rewards of the next one are asked for, or with the training."""
    job = read_job()
    import_unsloth()
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from unsloth_zoo.mlx.trainer import MLXGRPOConfig, MLXGRPOTrainer

    record, counts = Record(versions("unsloth", "unsloth_zoo", "mlx", "mlx-lm")), count_calls()
    model, tokenizer = load(job.model)
    model.freeze()
    lora = {"rank": job.rank, "scale": SCALE, "dropout": 0.0, "keys": list(LAYERS)}
    linear_to_lora_layers(model, len(model.layers), lora)

    def rewarded(
        prompts: list, completions: list, answer: list[str], **columns: object
    ) -> list[float]:
        # From one call for rewards to the next lies one whole step, cut at another place.
        record.step(take(counts))
        texts = [completion[0]["content"] for completion in completions]
        record.tokens.append(sum(len(tokenizer.encode(text)) for text in texts))
        rewards = score(job, texts, answer)
        record.rewards += rewards
        if record.check(job):
            raise Reached
        return rewards

    with tempfile.TemporaryDirectory() as folder:
        trainer = MLXGRPOTrainer(
            model=model,
            tokenizer=tokenizer,
            train_dataset=[
                {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
                for row in rows(job)
            ],
            args=MLXGRPOConfig(
                per_device_train_batch_size=job.prompts * job.group,
                gradient_accumulation_steps=1,
                max_steps=job.steps,
                learning_rate=job.rate,
                seed=job.seed,
                num_generations=job.group,
                max_completion_length=job.tokens,
                max_seq_length=job.max_length,
                temperature=1.0,
                beta=0.0,
                loss_type="bnpo",
                warmup_steps=0,
                output_dir=folder,
                compile=False,
                logging_steps=1,
            ),
            reward_funcs=[rewarded],
        )
        record.start(job)
        with contextlib.suppress(Reached):
            trainer.train()
    record.write(job)


if __name__ == "__main__":
    main()
