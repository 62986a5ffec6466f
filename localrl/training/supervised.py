"""Opens the task of a supervised run: worked examples, and maybe a task to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from localrl.memory.plan import PromptLength
from localrl.processes.worker import Worker
from localrl.records import Work
from localrl.rewards.in_process import InProcess
from localrl.rewards.scoring import Scorer
from localrl.tasks.loading import NO_TASK
from localrl.training.demonstrations import SupervisedTask, open_demonstrations
from localrl.training.given import Given
from localrl.training.opened_task import OpenedTask, checked_tokenizer, open_and_check
from localrl.training.resolved import ResolvedConfig
from localrl.training.validate import fit_prompts


def open_supervised(
    resolved: ResolvedConfig,
    worker: Worker,
    warn: Callable[[str], None],
    beat: Callable[[Work], None],
    *,
    given: Given,
) -> OpenedTask:
    """Open the worked examples of a run, and the task whose held-out prompts it samples.

    Raises: ConfigError or DataError for what cannot work.
    """
    config = resolved.config
    measured = None
    if config.task.name != NO_TASK:
        measured = open_and_check(
            resolved,
            worker,
            warn,
            beat,
            given=given,
            trains=False,
            whole=False,
            try_rewards=False,
        )
    tokenizer = measured.tokenizer if measured else checked_tokenizer(resolved, warn)
    beat(Work("reading the worked examples"))
    found = open_demonstrations(config, resolved.model_folder, worker, tokenizer)
    task = SupervisedTask(found, measured.task if measured else None)
    config = fit_prompts(config, task, warn)
    prompt, _ = found.longest
    prompts = PromptLength(prompt, f"measured on all {len(found.written)} worked examples")
    if measured is not None:
        if measured.prompts.tokens > prompt and measured.held_out:
            prompts = measured.prompts
        return replace(measured, config=config, task=task, prompts=prompts, demonstrations=found)
    scorer = Scorer((), InProcess(worker, {}), warn, beat=beat, scores=False)
    return OpenedTask(
        config=config,
        task=task,
        environments=None,
        scorer=scorer,
        decide=None,
        tokenizer=tokenizer,
        prompts=prompts,
        judges=(),
        demonstrations=found,
    )
