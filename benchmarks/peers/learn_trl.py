"""TRL's GRPOTrainer with PEFT on torch's CPU, evaluated by generated tokens.

    ENVIRONMENT/bin/python benchmarks/peers/learn_trl.py FOLDER

FOLDER has model/ and job.json, as benchmarks/outsider.py writes them; result.json is written there.
TRL's own defaults hold but for the shape of a step, the adapters, the learning rate and its
warm-up, the temperature and the length.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
MICRO_ROWS = 8
"""Completions of one backward pass: logits of a whole step would be gigabytes."""
ROWS = 64
"""Prompts generated at once in an evaluation."""

Texts = list[list[dict[str, str]]]
Row = dict[str, Any]


def find(target: str) -> Callable[..., list[float | None]]:
    """Return the reward function that `module:function` or `path.py:function` names."""
    place, _, name = target.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    spec = importlib.util.spec_from_file_location("rewards", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def scored(rewards: list[tuple[str, float]], texts: Texts, data: list[Row]) -> list[float]:
    """Return the weighted sums of the rewards of completions; None counts as 0."""
    columns = [json.loads(row["columns"]) for row in data]
    given = {name: [each.get(name) for each in columns] for name in columns[0]}
    given["answer"] = [json.loads(row["answer"]) for row in data]
    given["prompts"] = [row["prompt"] for row in data]
    parts = [(find(target)(completions=texts, **given), weight) for target, weight in rewards]
    return [sum(w * (part[i] or 0.0) for part, w in parts) for i in range(len(texts))]


class Course:
    """The evaluations so far, and when the run ends."""

    def __init__(self, job: Row) -> None:
        self.job = job
        self.tokens = 0
        self.evaluations: list[Row] = []
        self.ended = "budget"
        self._spent, self._since = [0.0, 0.0], [0.0, 0.0]

    def begin(self) -> None:
        """Training goes on."""
        self._since = [time.perf_counter(), time.process_time()]

    def pause(self) -> None:
        """Training stops, to be evaluated."""
        now = [time.perf_counter(), time.process_time()]
        self._spent = [s + n - b for s, n, b in zip(self._spent, now, self._since, strict=True)]

    def due(self) -> bool:
        """Whether a multiple of `every` tokens was passed, or the run ends."""
        last = self.evaluations[-1]["tokens"] // self.job["every"]
        return self.tokens // self.job["every"] > last or self.over()

    def over(self) -> bool:
        """Whether tokens or time are used up, or the task is learned; `ended` says which."""
        last = [each["pass@1"] for each in self.evaluations[-2:]]
        learned = len(last) == 2 and min(last) > self.job["stop"]
        late = self._spent[0] > self.job["limit_s"]
        self.ended = "learned" if learned else "time" if late else "budget"
        return learned or late or self.tokens >= self.job["budget"]

    def add(self, step: int, passed: float, mean_tokens: float) -> None:
        """Keep an evaluation."""
        spent = {"wall_s": self._spent[0], "cpu_s": self._spent[1]}
        reached = {"pass@1": passed, "mean_completion_tokens": mean_tokens}
        self.evaluations.append({"step": step, "tokens": self.tokens, **spent, **reached})


def evaluate(model: Any, tokenizer: Any, job: Row) -> tuple[float, float]:
    """Return pass@1 on the held-out prompts, and the mean length of completions in tokens."""
    import torch

    texts, lengths = [], []
    tokenizer.padding_side = "left"
    model.eval()
    for first in range(0, len(job["held_out"]), ROWS):
        prompts = [row["prompt"] for row in job["held_out"][first : first + ROWS]]
        given = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            found = model.generate(
                **given, do_sample=True, temperature=job["temperature"], top_k=0, top_p=1.0,
                max_new_tokens=job["tokens"],
            )  # fmt: skip
        for ids in found[:, given["input_ids"].shape[1] :].tolist():
            kept = (
                ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
            )
            lengths.append(len(kept))
            texts.append([{"role": "assistant", "content": tokenizer.decode(kept)}])
    model.train()
    rewards = scored(job["rewards"][:1], texts, job["held_out"])
    passed = sum(reward >= 1 - 1e-9 for reward in rewards)
    return passed / len(rewards), sum(lengths) / len(lengths)


def main() -> None:
    """Train, evaluate, and write what came of it."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    sys.path.insert(0, job["repository"])
    os.environ.update({**dict.fromkeys(OFFLINE, "1"), "CUDA_VISIBLE_DEVICES": ""})
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback, TrainerControl
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(job["threads"] or len(os.sched_getaffinity(0)))
    torch.manual_seed(job["seed"])
    course = Course(job)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    class Marks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            course.add(0, *evaluate(trainer.model, tokenizer, job))
            course.begin()

        def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
            course.pause()
            if course.due():
                course.add(state.global_step, *evaluate(trainer.model, tokenizer, job))
                control.should_training_stop |= course.over()
            course.begin()

    def reward(completions: Texts, completion_ids: list, **columns: list) -> list[float]:
        course.tokens += sum(map(len, completion_ids))
        names = ("prompts", "answer", "columns")
        rows = zip(*(columns[name] for name in names), strict=True)
        data = [{"prompt": p, "answer": a, "columns": c} for p, a, c in rows]
        return scored(job["rewards"], completions, data)

    trainer = GRPOTrainer(
        model=str(folder / "model"),
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(job["train"]),
        callbacks=[Marks()],
        args=GRPOConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            bf16=False,
            max_steps=100_000,
            per_device_train_batch_size=MICRO_ROWS,
            gradient_accumulation_steps=job["prompts"] * job["group"] // MICRO_ROWS,
            num_generations=job["group"],
            max_completion_length=job["tokens"],
            learning_rate=job["lr"],
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=job["warmup"],
            seed=job["seed"],
            beta=0.0,
            temperature=job["temperature"],
            save_strategy="no",
            report_to=[],
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            model_init_kwargs={"dtype": "float32"},
        ),
        peft_config=LoraConfig(
            r=job["rank"],
            lora_alpha=round(job["scale"] * job["rank"]),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    result = {"evaluations": course.evaluations, "ended": course.ended}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
