"""mlx-tune's GRPO, on the job of all runners."""

from __future__ import annotations

import tempfile

from common import (
    LAYERS,
    SCALE,
    Record,
    count_calls,
    even,
    read_job,
    rows,
    take,
    versions,
)


def main() -> None:
    """Train: a step is counted from one group's last reward to the next one's."""
    job = read_job()
    from mlx_tune import FastLanguageModel, GRPOConfig, GRPOTrainer

    record, counts = Record(versions("mlx-tune", "mlx", "mlx-lm")), count_calls()
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=job.model, max_seq_length=job.max_length, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        target_modules=[name.split(".")[-1] for name in LAYERS],
        lora_alpha=int(SCALE * job.rank),
    )
    lengths: list[int] = []

    def rewarded(response: str, answer: str) -> float:
        lengths.append(len(response.split()))
        if len(lengths) == job.group:
            record.tokens.append(sum(lengths))
            record.step(take(counts))
            lengths.clear()
        return even(response)

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            train_dataset=rows(job),
            tokenizer=tokenizer,
            reward_fn=rewarded,
            args=GRPOConfig(
                num_generations=job.group,
                max_completion_length=job.tokens,
                temperature=1.0,
                learning_rate=job.rate,
                max_steps=job.steps,
                logging_steps=1,
                output_dir=folder,
            ),
        )
        record.start(job)
        trainer.train()
    record.write(job)


if __name__ == "__main__":
    main()
