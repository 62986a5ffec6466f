"""Reward functions. The signature is TRL's: lists with one entry for each completion."""


def right(completions, answer, **kwargs):
    """1 where the answer stands behind the last #, else 0.

    completions: what the model wrote; answer: the column of data.jsonl. Any other column of the
    data is an argument too, by its name. A score of None says nothing about a completion.
    """
    scores = []
    for text, gold in zip(completions, answer, strict=True):
        written = text.rpartition("#")[2]  # all of the text where there is no #
        scores.append(1.0 if written.strip() == gold else 0.0)
    return scores
