"""What a run works with, opened in the order in which things can fail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from localrl import backend
from localrl.backend import mx
from localrl.config import RunConfig
from localrl.embedded import embedded_model_path
from localrl.errors import ConfigError, DataError
from localrl.evaluate import Evaluation, evaluate, temperature_one
from localrl.learning.credit import Credit, assign_credit
from localrl.learning.objectives import describe, make_objective, weigh_prompt
from localrl.learning.selection import Selection
from localrl.learning.tracker import Tracker
from localrl.learning.update import Updater
from localrl.memory.machine import resident_bytes
from localrl.memory.plan import make_plan
from localrl.policy.lora import save_adapter
from localrl.policy.model import LoadedModel, Policy, load_model, make_policy, read_shape
from localrl.policy.precision import dense_bytes
from localrl.records import Example, MemoryPlan, ScoredGroup
from localrl.rewards.scoring import Scorer
from localrl.rollouts.decode import Decoder
from localrl.rollouts.forking import EntropyRule, PeriodicRule, make_rule
from localrl.runs.folder import RunFolder, default_run_path, open_run, package_versions
from localrl.runs.logs import GroupRecord, to_json, write_atomic
from localrl.tasks.base import Task
from localrl.tasks.builtin import load_task
from localrl.worker import Worker

TREE_KAPPA = 4.0
"""With two children a lone sibling is a poor baseline: see docs/papers.md and the benchmark."""

PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers", "huggingface-hub")


class Progress(Protocol):
    """Who watches a run."""

    def begin(self, session: Session) -> None: ...
    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...
    def stepped(self, metrics: Mapping[str, Any]) -> None: ...
    def warn(self, line: str) -> None: ...


class Silent:
    """Nobody watches."""

    def begin(self, session: Session) -> None: ...
    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...
    def stepped(self, metrics: Mapping[str, Any]) -> None: ...
    def warn(self, line: str) -> None: ...


@dataclass(eq=False)
class Session:
    """Everything open for one run, and the few things that are done with several of them."""

    config: RunConfig
    model_folder: Path
    task: Task
    policy: Policy
    plan: MemoryPlan
    scorer: Scorer
    decoder: Decoder
    updater: Updater
    run: RunFolder
    progress: Progress
    held_out: list[Example]
    rule: EntropyRule | PeriodicRule | None
    """Where paths fork; None for flat groups."""
    tracker: Tracker = field(default_factory=Tracker)
    tokens: int = 0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.path

    @property
    def roots(self) -> int:
        """Independent completions, or beginnings of them, of each prompt."""
        return self.config.rollout.roots if self.rule else self.plan.group_size

    def credit(self, scored: ScoredGroup) -> Credit:
        """The group's credit, from what the tracker knew before and weighted by the objective."""
        wish = self.config.learning.kappa
        kappa = wish if wish is not None else TREE_KAPPA if self.rule else 0.0
        value = self.tracker.value(scored.group.example.tracker_key)
        credit = (
            assign_credit(scored)
            if value is None
            else assign_credit(scored, kappa=kappa, prior=value)
        )
        return weigh_prompt(self.updater.objective, scored, credit)

    def learn(self, scored: Sequence[ScoredGroup], credits: Sequence[Credit]) -> None:
        """Let the tracker and the fork rule take in a finished step."""
        self.tracker.update(scored, credits)
        if self.rule:
            self.rule.learn([group.group for group in scored])

    def encode(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """Token ids of the examples' prompts.

        Raises: DataError for a prompt longer than max_prompt_tokens: nothing is cut silently.
        """
        prompts = [self.policy.tokenizer.encode(example.messages) for example in examples]
        for example, prompt in zip(examples, prompts, strict=True):
            if not 0 < len(prompt) <= self.plan.max_prompt_tokens:
                raise DataError(
                    f"The prompt of {example.id} has {len(prompt)} tokens; allowed are 1 to "
                    f"{self.plan.max_prompt_tokens}. Raise rollout.max_prompt_tokens."
                )
        return prompts

    def evaluate(self, step: int) -> Evaluation | None:
        """pass@1 of the adapters as they are, logged; None when no evaluation is wanted."""
        if not self.held_out:
            return None
        evaluation = evaluate(
            temperature_one(self.decoder),
            self.held_out,
            self.encode(self.held_out),
            self.scorer.score,
            highest_reward=sum(spec.weight for spec in self.task.rewards),
            max_completion_tokens=self.plan.max_completion_tokens,
        )
        numbers = evaluation.summary()
        del numbers["ci95"]
        self.run.metrics({"step": step, **{f"eval/{k}": v for k, v in numbers.items()}})
        self.progress.evaluated(step, evaluation)
        return evaluation

    def log_step(
        self,
        step: int,
        scored: Sequence[ScoredGroup],
        credits: Sequence[Credit],
        selection: Selection,
        metrics: Mapping[str, Any],
    ) -> None:
        """Write one step's metrics and rollouts, and show them."""
        self.tokens += metrics["rollout/tokens"]
        record = {
            "step": step,
            "num_tokens": self.tokens,
            "rewards/failures": sum(count.failures for count in self.scorer.counts.values()),
            "rollout/informative_groups": sum(selection.informative),
            "memory/peak_bytes": mx.get_peak_memory(),
            "memory/resident_bytes": resident_bytes(),
            **metrics,
        }
        mx.reset_peak_memory()
        self.run.metrics(record)
        self.run.rollouts(
            step,
            [
                GroupRecord(group, credit.advantages, kept, selection.reason(i))
                for i, (group, credit, kept) in enumerate(
                    zip(scored, credits, selection.kept, strict=True)
                )
            ],
        )
        self.progress.stepped(record)

    def save_adapter(self) -> Path:
        """Write the adapters in mlx-lm's format."""
        folder = self.folder / "adapter"
        save_adapter(self.policy.model, self.policy.lora_keys, folder)
        return folder

    def finish(self, base: Evaluation | None, adapter: Evaluation | None) -> None:
        """Write eval.json, when there were evaluations."""
        if base is None or adapter is None:
            return
        result = {
            "task": self.task.name,
            "n": len(self.held_out),
            "base": base.summary(),
            "adapter": adapter.summary(),
        }
        write_atomic(self.folder / "eval.json", to_json(result, indent=2) + b"\n")


@contextmanager
def open_session(config: RunConfig, *, overwrite: bool, progress: Progress) -> Iterator[Session]:
    """Open everything that the run needs; nothing is computed before all of it is there.

    Raises: ConfigError or DataError, saying what cannot work.
    """
    task = load_task(config.task.name, train_prompts=config.task.train_prompts)
    _check_sizes(config, task)
    model_folder = Path(config.model.path) if config.model.path else embedded_model_path()
    read_shape(model_folder)
    with ExitStack() as stack:
        worker = stack.enter_context(
            Worker(
                time_limit_s=config.task.reward_timeout_s,
                memory_limit_bytes=config.task.reward_memory_mb * 2**20,
            )
        )
        scorer = Scorer(task.rewards, worker, progress.warn)
        scorer.check(task.train(0).columns)
        loaded = load_model(model_folder)
        plan = _plan(config, loaded, model_folder)
        policy = _policy(config, loaded, plan)
        run = stack.enter_context(_open_folder(config, overwrite))
        run.write_config(config.to_toml())
        run.write_plan(plan)
        run.event("objective", **describe(config.learning, config.rollout.group_size))
        session = Session(
            config=config,
            model_folder=model_folder,
            task=task,
            policy=policy,
            plan=plan,
            scorer=scorer,
            decoder=Decoder(policy, config.rollout.temperature, plan.decode_rows),
            updater=Updater(policy, config.learning, config.rollout.temperature, progress.warn),
            run=run,
            progress=progress,
            held_out=task.evaluation(config.task.eval_prompts),
            rule=make_rule(config.rollout),
        )
        if note := backend.describe().note:
            progress.warn(note)
        progress.begin(session)
        yield session


def _check_trees(config: RunConfig) -> None:
    rollout, rows = config.rollout, config.memory.decode_rows
    if rollout.roots > rollout.group_size:
        raise ConfigError(
            f"rollout.roots is {rollout.roots}, more than the {rollout.group_size} completions of "
            "rollout.group_size. Lower it, or raise the group size."
        )
    if 0 < rows < rollout.group_size:
        raise ConfigError(
            f"memory.decode_rows is {rows}, but a tree may have {rollout.group_size} leaves at "
            "once. Raise it, or lower rollout.group_size."
        )
    if make_objective(config.learning).flat_only:
        raise ConfigError(
            f"learning.objective is {config.learning.objective}, which divides by the length of "
            "the one completion a token belongs to; in a tree completions share tokens. Choose "
            "another objective, or rollout.strategy=flat."
        )


def _check_sizes(config: RunConfig, task: Task) -> None:
    if config.rollout.strategy == "tree":
        _check_trees(config)
    wanted, there = config.rollout.prompts_per_step, task.train_size
    if 0 < there < wanted:
        raise ConfigError(
            f"rollout.prompts_per_step is {wanted}, but the task has {there} training prompts. "
            "Lower it, or raise task.train_prompts."
        )


def _plan(config: RunConfig, loaded: LoadedModel, folder: Path) -> MemoryPlan:
    if config.memory.threads:
        backend.set_threads(config.memory.threads)
    machine = backend.describe()
    return make_plan(
        config,
        vocabulary=read_shape(folder).vocabulary,
        dense_bytes=dense_bytes(loaded.model),
        on_cpu=machine.device == "cpu",
        threads=machine.threads,
    )


def _policy(config: RunConfig, loaded: LoadedModel, plan: MemoryPlan) -> Policy:
    return make_policy(
        loaded,
        rank=config.lora.rank,
        scale=config.lora.scale,
        seed=config.run.seed,
        for_cpu=backend.describe().device == "cpu",
        dense=plan.dequantise,
    )


def _open_folder(config: RunConfig, overwrite: bool) -> RunFolder:
    wish = config.run.out
    out = Path(wish) if wish else default_run_path(Path("runs"), config.task.name)
    versions = package_versions(PACKAGES)
    machine = backend.describe()
    return open_run(
        out,
        overwrite=overwrite,
        versions={**versions, "device": machine.device, "blas": machine.blas},
        rollout_log_limit=config.run.rollout_log_limit,
    )
