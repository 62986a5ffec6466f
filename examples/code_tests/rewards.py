"""The reward of this example: a completion's program is run, and must print the right thing."""

import json

from localrl.rewards.code import CodeLimits, check_code_rewards, score_programs

LIMITS = CodeLimits(program_s=2, total_s=25)

check_code_rewards()  # refuses where no sandbox holds, before anything is trained


def prints_right(completions, tests, **kwargs):
    """The share of tests that a completion's program passes; programs run in the sandbox alone."""
    return score_programs([program(text) for text in completions], tests, limits=LIMITS)


def program(text):
    """A program that prints the expression in the call, or, without a call, the text itself.

    The embedded model writes {"arguments": {"expression": "47*85"}} and knows no Python beyond
    that. A model that writes whole programs in a fenced block needs no such function.
    """
    try:
        call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        return f"print({call['arguments']['expression']})"
    except (ValueError, TypeError, KeyError):
        return f"print({text!r})"
