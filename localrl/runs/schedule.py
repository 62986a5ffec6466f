"""The steps after which a run evaluates."""


def evaluation_due(step: int, steps: int, every: int) -> bool:
    """True before the first step, after the last, and after every `every` steps unless it is 0."""
    return step in (0, steps) or (every > 0 and step % every == 0)


def evaluations_after(step: int, steps: int, every: int) -> int:
    """Number of evaluations that come after this step's own."""
    if step >= steps:
        return 0
    return 1 + ((steps - 1) // every - step // every if every else 0)
