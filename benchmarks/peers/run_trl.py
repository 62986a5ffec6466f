"""TRL's GRPOTrainer with PEFT on torch's CPU, on the job of all runners."""

from __future__ import annotations

import os
import tempfile

from common import SCALE, Record, read_job, rows, score, versions


def main() -> None:
    """Train with both cores, in float32, without gradient checkpointing, which would be slower."""
    job = read_job()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback, TrainerControl
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    record = Record(versions("trl", "torch", "transformers", "peft"))

    class Marks(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            record.start(job)

        def on_step_end(
            self, args: object, state: object, control: TrainerControl, **_: object
        ) -> None:
            record.step()
            control.should_training_stop |= record.check(job)

    def rewarded(
        completions: list, completion_ids: list, answer: list[str], **columns: object
    ) -> list[float]:
        record.tokens.append(sum(map(len, completion_ids)))
        rewards = score(job, [completion[0]["content"] for completion in completions], answer)
        record.rewards += rewards
        return rewards

    data = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
        for row in rows(job)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=job.model,
            processing_class=AutoTokenizer.from_pretrained(job.model),
            reward_funcs=rewarded,
            train_dataset=Dataset.from_list(data),
            callbacks=[Marks()],
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                max_steps=job.steps,
                per_device_train_batch_size=job.prompts * job.group,
                gradient_accumulation_steps=1,
                num_generations=job.group,
                max_completion_length=job.tokens,
                learning_rate=job.rate,
                seed=job.seed,
                lr_scheduler_type="constant",
                beta=0.0,
                temperature=1.0,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                gradient_checkpointing=False,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                model_init_kwargs={"dtype": "float32"},
            ),
            peft_config=LoraConfig(
                r=job.rank,
                lora_alpha=int(SCALE * job.rank),
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
        trainer.train()
    record.write(job)


if __name__ == "__main__":
    main()
