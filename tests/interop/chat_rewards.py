"""A user's reward file for TRL and chat data, in the shapes of TRL's pages."""

import re


# Example 2 of the page on GRPO
def think_then_answer(completions, **kwargs):
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, text) else 0.0 for text in texts]


# The quick start of the trainers
def unique_characters(completions, **kwargs):
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def right_answer(prompts, completions, answer, **kwargs):
    """Only where there is a gold answer; the question must be the user's."""
    assert all(messages[-1]["role"] == "user" for messages in prompts)
    texts = [completion[0]["content"] for completion in completions]
    pairs = zip(texts, answer, strict=True)
    return [None if gold is None else float(gold in text) for text, gold in pairs]


def whole_numbers(completion_ids, completions, **kwargs):
    """Integers and booleans are rewards as well."""
    return [len(ids) if i % 2 else ids[0] > 9 for i, ids in enumerate(completion_ids)]
