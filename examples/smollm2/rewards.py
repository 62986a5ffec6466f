"""What an answer in JSON is worth. The signature is TRL's: one entry for each completion."""

import json


def facts(completions, answer, **columns):
    """1 for the right JSON object and nothing else; the share of its facts where some are right.

    completions: what the model wrote, as chat messages; answer: the right objects, as JSON.
    An answer that a program could not read as it stands is worth 0: one in a code block, or with
    a sentence around it. A number must be one, and not a text with digits.
    """
    texts = [completion[0]["content"] for completion in completions]
    return [share(text, json.loads(gold)) for text, gold in zip(texts, answer, strict=True)]


def share(text, gold):
    """The share of facts that are right; a key that was not asked for counts as one that is not."""
    try:
        found = json.loads(text)
    except ValueError:
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    right = [key for key in gold if same(found.get(key), gold[key])]
    return len(right) / len(found | gold)


def same(one, other):
    """Whether two values are the same, in type as well."""
    return type(one) is type(other) and one == other
