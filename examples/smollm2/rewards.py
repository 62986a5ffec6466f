"""What an answer in JSON is worth. The signature is TRL's: one entry for each completion."""

import json


def facts(completions, answer, **columns):
    """1 for the right JSON object and nothing else; the share of its facts where some are right.

    completions: what the model wrote; answer: the right objects, or texts that hold them.
    An answer that a program could not read as it stands is worth 0: one in a code block, or with
    a sentence around it. A number must be one, and not a text with digits.
    """
    return [share(text_of(c), object_of(a)) for c, a in zip(completions, answer, strict=True)]


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


def text_of(completion):
    """What the model wrote: a text where prompts are texts, else in a chat message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def object_of(answer):
    """The right object."""
    return answer if isinstance(answer, dict) else json.loads(answer)
