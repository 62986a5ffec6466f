"""Reward functions for TRL's GRPOTrainer, as its documentation writes them; used here unchanged."""


def right(completions, ground_truth, log_extra=None, log_metric=None, **kwargs):
    """1 where the answer behind the last # is the true one; logs what was found."""
    found = [text.rpartition("#")[2].strip() for text in completions]
    rewards = [1.0 if a == b else 0.0 for a, b in zip(found, ground_truth, strict=True)]
    if log_extra:
        log_extra("found", found)
        log_extra("ground_truth", list(ground_truth))
    if log_metric:
        log_metric("accuracy", sum(rewards) / len(rewards))
    return rewards


def sums_worked(completions, task, **kwargs):
    """For sums alone: the share of steps that are worked out and not guessed with a ?."""
    rewards = []
    for text, kind in zip(completions, task, strict=True):
        steps = text.split(";")[1:-1]
        if kind != "sums":
            rewards.append(None)  # the other functions judge these rows
        else:
            rewards.append(sum("?" not in step for step in steps) / max(len(steps), 1))
    return rewards


def brief(completion_ids, **kwargs):
    """A little less for every token."""
    return [-len(ids) / 64 for ids in completion_ids]
