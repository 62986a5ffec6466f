"""inductive-mlxrl's GRPO through its Python interface, on the job of all runners."""

from __future__ import annotations

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
    """Batched rollouts with one prefill, then one update, for each prompt."""
    job = read_job()
    import mlx.optimizers as optim
    from mlxrl.algo import GRPOAlgorithm
    from mlxrl.policy import LoRAConfig, load_policy_with_lora
    from mlxrl.policy.logprobs import pad_token_id_from_tokenizer
    from mlxrl.rollout.naive import SamplingConfig
    from mlxrl.rollout.optimized import generate_prefix_cached_group_rollouts
    from mlxrl.train import batch_from_rollouts, optimizer_step

    record, counts = Record(versions("inductive-mlxrl", "mlx", "mlx-lm")), count_calls()
    lora = LoRAConfig(
        rank=job.rank,
        scale=SCALE,
        dropout=0.0,
        target_suffixes=tuple(name.split(".")[-1] for name in LAYERS),
    )
    model, tokenizer, _ = load_policy_with_lora(model_id=job.model, config=lora)
    optimizer, algorithm = optim.Adam(learning_rate=job.rate), GRPOAlgorithm()
    pad = pad_token_id_from_tokenizer(tokenizer)
    sampling = SamplingConfig(max_tokens=job.tokens, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0)
    texts = [row["prompt"] for row in rows(job)]
    record.start(job)
    for step in range(job.steps):
        completions = generate_prefix_cached_group_rollouts(
            model=model,
            tokenizer=tokenizer,
            prompts=[texts[step % len(texts)]],
            group_size=job.group,
            config=sampling,
            seed=step,
            use_chat_template=True,
            batch_groups=True,
        )
        batch = batch_from_rollouts(
            model=model,
            completions=completions,
            rewards=[even(completion.text) for completion in completions],
            group_size=job.group,
            pad_token_id=pad,
            algorithm=algorithm,
            compute_reference=False,
        )
        optimizer_step(
            model=model,
            optimizer=optimizer,
            batch=batch,
            beta=0.0,
            pad_token_id=pad,
            algorithm=algorithm,
        )
        record.tokens.append(sum(len(each.completion_tokens) for each in completions))
        record.step(take(counts))
    record.write(job)


if __name__ == "__main__":
    main()
