"""The reward of this example: how many letters stand where they belong."""


def in_order(completions, answer, **kwargs):
    """The share of places with the right letter; 1 when all letters are in order."""
    scores = []
    for text, gold in zip(completions, answer, strict=True):
        written = text.rpartition("#")[2].strip()  # what stands behind the last #
        right = sum(a == b for a, b in zip(written, gold, strict=False))
        scores.append(right / max(len(written), len(gold)))
    return scores
