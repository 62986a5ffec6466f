"""mlx-lm-lora's GRPO through its Python interface, on the job of all runners."""

from __future__ import annotations

import tempfile

from common import SCALE, Record, count_calls, even, read_job, rows, take, versions


def main() -> None:
    """Train; without a reference model, which this job does not need."""
    job = read_job()
    import mlx.optimizers as optim
    from mlx_lm_lora.trainer.datasets import CacheDataset, GRPODataset
    from mlx_lm_lora.trainer.grpo_trainer import GRPOTrainingArgs, train_grpo
    from mlx_lm_lora.utils import from_pretrained

    record, counts = Record(versions("mlx-lm-lora", "mlx", "mlx-lm")), count_calls()

    def even_reward(
        prompts: list, completions: list, answer: list, types: object = None
    ) -> list[float]:
        record.tokens.append(sum(len(text.split()) for text in completions))
        return [even(text) for text in completions]

    class Marks:
        def on_train_loss_report(self, info: dict) -> None:
            record.step(take(counts))

        def on_val_loss_report(self, info: dict) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, adapter = from_pretrained(
            model=job.model,
            new_adapter_path=folder,
            lora_config={
                "rank": job.rank,
                "dropout": 0.0,
                "scale": SCALE,
                "use_dora": False,
                "num_layers": -1,
            },
            quantized_load=None,
        )
        data = [{**row, "system": ""} for row in rows(job)]
        data = CacheDataset(GRPODataset(data, tokenizer))
        record.start(job)
        train_grpo(
            model=model,
            ref_model=None,
            tokenizer=tokenizer,
            optimizer=optim.Adam(learning_rate=job.rate),
            train_dataset=data,
            val_dataset=None,
            reward_funcs=[even_reward],
            args=GRPOTrainingArgs(
                batch_size=1,
                iters=job.steps,
                val_batches=0,
                steps_per_report=1,
                steps_per_eval=10**9,
                steps_per_save=10**9,
                adapter_file=adapter,
                max_seq_length=job.max_length,
                max_completion_length=job.tokens,
                group_size=job.group,
                beta=0.0,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                epsilon=0.2,
            ),
            training_callback=Marks(),
            end_answer_token=None,
        )
    record.write(job)


if __name__ == "__main__":
    main()
