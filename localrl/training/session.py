"""An open training run: its components plus run folder, checkpoints and progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from localrl.backend import mx
from localrl.distributed import step_stats
from localrl.distributed.collective import ALONE, Ranks
from localrl.distributed.gather import gather
from localrl.errors import RewardError
from localrl.evaluate import Evaluation
from localrl.export.adapters import adapter_of, write_adapter
from localrl.export.base import find_base_id
from localrl.learning.credit import Credit, assign_credit
from localrl.learning.objectives import denominator, weigh_prompt
from localrl.learning.selection import Selection, round_small, select
from localrl.memory.adapting import MemoryMonitor, MemoryReading, shrink_plan
from localrl.memory.machine import read_machine, resident_bytes
from localrl.memory.plan import changes
from localrl.processes.heartbeat import Heartbeat
from localrl.records import Example, MemoryPlan, ScoredGroup, StepStats
from localrl.runs.checkpoints import Checkpoints
from localrl.runs.dashboards import Dashboard, log
from localrl.runs.folder import RunFolder
from localrl.runs.health import UNREWARDED, Health
from localrl.runs.logs import GroupRecord, to_json, write_atomic
from localrl.runs.metrics import sampled_tokens
from localrl.runs.null_folder import NullRunFolder
from localrl.training.components import Components
from localrl.training.demonstrations import full_credit
from localrl.training.evaluating import evaluate
from localrl.training.forecast import Forecast
from localrl.training.memory_plan import for_longer_prompts
from localrl.utils.rng import keyed_uniforms

WAITED = "waited_s"
"""Counter kept for every step; logged as a metric of each rank when there are several."""


class Progress(Protocol):
    """An observer of a run."""

    def start(self, heartbeat: Heartbeat) -> None:
        """Begin to show what the heartbeat names, while the run is opened."""
        ...

    def begin(self, session: Session) -> None: ...
    def evaluating(self, step: int) -> None: ...
    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...
    def stepped(self, metrics: Mapping[str, Any]) -> None: ...
    def warn(self, line: str) -> None: ...
    def end(self) -> None:
        """The run is over, or has failed."""
        ...


class NullProgress:
    """An observer that ignores everything."""

    def start(self, heartbeat: Heartbeat) -> None: ...
    def begin(self, session: Session) -> None: ...
    def evaluating(self, step: int) -> None: ...
    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...
    def stepped(self, metrics: Mapping[str, Any]) -> None: ...
    def warn(self, line: str) -> None: ...
    def end(self) -> None: ...


@dataclass(eq=False)
class Session(Components):
    """Everything open for one run, and the operations that involve several components."""

    run: RunFolder | NullRunFolder
    progress: Progress
    checkpoints: Checkpoints
    sources: Mapping[str, str]
    """Hashes of the run's model and data, see `state.sources_of`."""
    health: Health
    watch: MemoryMonitor
    """The recent memory readings."""
    forecast: Forecast
    """Expected duration of the rest of the run."""
    ranks: Ranks = ALONE
    """The ranks that train together."""
    dashboards: Sequence[Dashboard] = ()
    step: int = 0
    """Number of steps done when the session was opened: 0, or more if it resumes a run."""
    tokens: int = 0
    """Number of completion tokens sampled so far."""
    trained_s: float = 0.0
    """Total seconds of all steps so far."""
    peak_bytes: int = 0
    """Peak bytes that MLX held in a step so far."""
    unrewarded: int = 0
    """Number of the last steps in a row in which no completion got a reward."""
    told_checks: int = 0
    """Number of the policy's self-checks that are in the run's events."""
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    """Evaluations, keyed by the step after which they were made."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.path

    def credit(self, step: int, scored: ScoredGroup) -> Credit:
        """Return the group's credit, weighted by the objective."""
        learning, example = self.config.learning, scored.group.example
        if self.demonstrations is not None:
            return full_credit(scored.group)
        credit = assign_credit(scored, kappa=self.config.tracker_weight)
        credit = weigh_prompt(self.updater.objective, scored, credit)
        if not learning.min_advantage:
            return credit
        uniforms = keyed_uniforms(
            len(credit.advantages), self.config.run.seed, step, example.id, "small"
        )
        return round_small(credit, learning.min_advantage, uniforms)

    def select(
        self, step: int, scored: Sequence[ScoredGroup], credits: Sequence[Credit]
    ) -> Selection:
        """Return the batch of a step: everything that teaches, divided by the planned number."""
        objective, config = self.updater.objective, self.config
        z = denominator(objective, scored, credits, config.rollout.max_completion_tokens)
        return select(scored, credits, z, objective, mask_truncated=config.learning.mask_truncated)

    def learn(
        self,
        scored: Sequence[ScoredGroup],
        credits: Sequence[Credit],
        stats: StepStats,
    ) -> None:
        """Let the tracker and the sampler learn from a step."""
        self.tracker.update(scored, credits)
        # After the samples drawn before the drift, so that it counts until the prompt's next visit.
        if stats.drift is not None:
            self.tracker.drifted(stats.drift)
        self.sampler.learn(scored)

    def tell_checks(self) -> None:
        """Log the self-checks made since the last call; one beyond its lower limit is told.

        The update makes its own check on its first batch. What was refused was told there.
        """
        checks = self.policy.checks[self.told_checks :]
        self.told_checks += len(checks)
        if checks:
            self.run.event("selfcheck", checks=[check.record() for check in checks])
        for check in checks:
            if check.verdict == "warn" and check.name.startswith("forest"):
                self.progress.warn(f"the self-check {check.name} found {check}")

    def evaluate(self, step: int) -> Evaluation | None:
        """Evaluate pass@1 after a step and log it; None if not configured, or not on rank 0.

        Uses the current adapters, unless this step was evaluated before.
        """
        if step in self.evaluations or not self.evaluates or not self.ranks.is_main:
            return self.evaluations.get(step)
        self.tell_rewards(step + 1)
        self.progress.evaluating(step)
        evaluation = evaluate(self, step)
        numbers = evaluation.summary()
        del numbers["ci95"]
        numbers.pop("demonstrations", None)
        spent = {"time/evaluation_s": self.forecast.evaluation_s}
        self._write({"step": step, **{f"eval/{k}": v for k, v in numbers.items()}, **spent})
        self.run.event("evaluation", step=step, **evaluation.details())
        self.progress.evaluated(step, evaluation)
        self.evaluations[step] = evaluation
        return evaluation

    def reduce_evaluations(self, count: int, prompt_s: float) -> None:
        """Evaluate on this many held-out prompts from now on, because one takes `prompt_s`."""
        wish, self.held_out = len(self.held_out), self.held_out[:count]
        self.run.event("evaluations", prompts=count, of=wish, seconds_per_prompt=prompt_s)
        self.progress.warn(
            f"evaluating on {wish} held-out prompts would take {wish * prompt_s / 60:.0f} min each "
            f"time; {count} are used, which makes intervals {(wish / count) ** 0.5:.1f} times as "
            f"wide. All are used with --set task.eval_prompts={wish}"
        )

    def drop_logs(self) -> None:
        """Discard the logs of rewards and tools since the last call."""
        self.scorer.take_logs()
        if self.sampler.environments is not None:
            self.sampler.environments.take_counts()

    def log_step(
        self,
        step: int,
        scored: Sequence[ScoredGroup],
        credits: Sequence[Credit],
        selection: Selection,
        metrics: Mapping[str, Any],
    ) -> None:
        """Write one step's metrics and rollouts, and show them.

        Rank 0 does this, after gathering the statistics of all ranks.

        Raises: RewardError, on every rank, if no completion got a reward in this step and the last.
        """
        self.tokens += metrics["rollout/tokens"]
        unrewarded = metrics["reward"] is None and self.demonstrations is None
        self.unrewarded = self.unrewarded + 1 if unrewarded else 0
        self.peak_bytes = max(self.peak_bytes, mx.get_peak_memory())
        own = dict(metrics)
        waited_s = own.pop(WAITED)
        stats = gather(self.ranks, self._rank_stats(scored, own, waited_s))
        self.tell_checks()
        if self.ranks.is_main:
            self._log_all(step, scored, credits, selection, own, stats)
        if self.unrewarded >= UNREWARDED:
            raise self._unrewarded_error()

    def _log_all(
        self,
        step: int,
        scored: Sequence[ScoredGroup],
        credits: Sequence[Credit],
        selection: Selection,
        own: Mapping[str, Any],
        stats: Sequence[step_stats.RankStats],
    ) -> None:
        """Write and show a step. own: metrics that all ranks share; stats: those of each rank."""
        logs, tokenizer = step_stats.logs(stats), self.policy.tokenizer
        record = {
            **logs.means(),
            **step_stats.tools(stats, own["rollout/completions"]),
            "step": step,
            "num_tokens": self.tokens,
            "rewards/failures": sum(one["failures"] for one in stats),
            "rollout/informative_groups": sum(selection.informative),
            "memory/peak_bytes": mx.get_peak_memory(),
            "memory/cache_bytes": mx.get_cache_memory(),
            "memory/resident_bytes": resident_bytes(),
            **own,
            **step_stats.counts(stats),
            **step_stats.rates(stats),
        }
        self._write(record)
        self.run.rollouts(
            step,
            [
                GroupRecord(
                    group,
                    credit.advantages,
                    selection.dropped[i],
                    extra=logs.of(group.group),
                    pieces=[
                        tokenizer.pieces(node.token_ids.tolist()) for node in group.group.nodes
                    ],
                )
                for i, (group, credit) in enumerate(zip(scored, credits, strict=True))
            ],
        )
        self.progress.stepped(record)
        for warning in self.health.see(record):
            self.run.event("warning", step=step, name=warning.name, text=warning.text)
            self.progress.warn(warning.text)

    def _unrewarded_error(self) -> RewardError:
        names = ", ".join(spec.name for spec in self.task.rewards)
        return RewardError(
            f"No completion of the last {self.unrewarded} steps got a reward: {names} gave None "
            "for all of them, so nothing can be learned. See whether the data have the columns "
            f"that it reads: localrl tasks check {self.config.task.name}"
        )

    def revise_plan(self, step: int) -> None:
        """Compare the step's memory use with the plan; if needed, switch plans and report it."""
        reading = MemoryReading(mx.get_peak_memory(), mx.get_cache_memory(), read_machine())
        mx.reset_peak_memory()
        if self.config.memory.pin:
            return
        found = self.watch.see(
            self.plan, reading, least_rows=self.least_rows, may_checkpoint=self.may_checkpoint
        )
        if found is not None:
            self.replan(step, *found)

    def make_room(self, step: int, examples: Sequence[Example]) -> None:
        """Replan if a prompt of the step is longer than the plan assumes.

        Every rank checks all prompts, because it may have to learn from any of them.
        """
        if self.config.memory.pin or self.demonstrations is not None:
            return  # of worked examples the longest is known
        if self.sampler.environments is not None:
            # Each may start differently on every call; a resumed run may allow more than before.
            tokens = self.config.rollout.max_prompt_tokens
        else:
            tokens = max(map(len, self.sampler.encode(examples)))
        if tokens <= self.plan.max_prompt_tokens:
            return
        self.request, plan = for_longer_prompts(self.config, self.request, self.plan, tokens)
        self.watch.most = plan
        self.replan(step, plan, f"a prompt has {tokens} tokens, more than was planned for")

    def shrink_plan(self, step: int, reason: str) -> bool:
        """Continue with smaller batches after a refused allocation; False if none are left to
        try."""
        plan = shrink_plan(
            self.plan, least_rows=self.least_rows, may_checkpoint=self.may_checkpoint
        )
        if plan is not None:
            self.replan(step, plan, reason)
        return plan is not None

    def replan(self, step: int, plan: MemoryPlan, reason: str) -> None:
        """Switch to another plan, and log and report the change."""
        told = {name: list(pair) for name, pair in changes(self.plan, plan).items()}
        self.use(plan)
        self.run.write_plan(plan)
        self.run.event("plan", step=step, reason=reason, changed=told)
        sizes = ", ".join(f"{name} {was} -> {now}" for name, (was, now) in told.items())
        self.progress.warn(f"{reason}; from now on: {sizes}")

    def _write(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics to the run folder, and send their numbers to the dashboards."""
        self.run.metrics(metrics)
        log(self.dashboards, metrics, self.progress.warn)

    def _rank_stats(
        self, fresh: Sequence[ScoredGroup], metrics: Mapping[str, Any], waited_s: float
    ) -> step_stats.RankStats:
        """Return this rank's statistics of a step."""
        environments, logs = self.sampler.environments, self.scorer.take_logs()
        has_tools = environments is not None and environments.has_tools
        return {
            "counts": {n: metrics[n] for n in self.counters() if n.startswith("rollout/")},
            "failures": sum(count.failures for count in self.scorer.counts.values()),
            "tools": environments.take_counts() if environments and has_tools else None,
            "metrics": logs.metrics,
            "rows": logs.rows,
            "tokens": sum(map(sampled_tokens, self.ranks.shard(fresh))),
            "waited_s": waited_s,
            "busy_s": metrics["step_time"] - waited_s,
        }

    def counters(self) -> dict[str, float]:
        """Return running totals, under the names of the metrics that log a step's part of them."""
        return {
            **{f"rollout/{name}": count for name, count in vars(self.decoder.counts).items()},
            "rollout/rescored_tokens": self.sampler.rescored_tokens,
            "time/reward_s": self.scorer.busy_s,
            WAITED: self.ranks.waited_s,
        }

    def tell_rewards(self, step: int) -> None:
        """Tell reward functions which step comes next (TRL's `trainer_state`)."""
        self.scorer.state = {
            "global_step": step - 1,  # steps done, as TRL counts
            "max_steps": self.config.run.steps,
            "epoch": self.epoch(step),
        }

    def epoch(self, step: int) -> float | None:
        """Return the passes over the training set drawn before this step; None if it is endless."""
        size = self.task.train_size
        return (step - 1) * self.config.rollout.prompts_per_step / size if size else None

    def save_adapter(self) -> None:
        """Write the adapters in the format of mlx-lm and PEFT, on rank 0 only."""
        if not self.ranks.is_main:
            return
        folder = self.folder / "adapter"
        settings = self.config.model
        base_id = find_base_id(settings.base_id, self.model_folder, settings.path)
        write_adapter(adapter_of(self.policy.model, base_id=base_id), folder)

    def finish(self, base: Evaluation | None, adapter: Evaluation | None) -> None:
        """Log the memory that the run used, and write eval.json if there were evaluations."""
        if not self.ranks.is_main:
            return
        self.peak_bytes = max(self.peak_bytes, mx.get_peak_memory())
        self.run.event(
            "memory",
            predicted_bytes=self.plan.predicted_bytes,
            peak_bytes=self.peak_bytes,
            limit_bytes=self.plan.limit_bytes,
        )
        if base is None or adapter is None:
            return
        result = {
            "task": self.task.name,
            "n": len(self.held_out),
            "base": base.summary(),
            "adapter": adapter.summary(),
        }
        write_atomic(self.folder / "eval.json", to_json(result, indent=2) + b"\n")
