"""An agent that plays number guessing: it talks to the model as to any server of OpenAI's API.

The rows are those of the built-in task `guessing`. Any client would do; this one needs nothing
installed.
"""

import json
import re
import urllib.error
import urllib.request


def ask(base_url, api_key, messages):
    """Return the model's next message."""
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps({"model": "any name", "messages": messages}).encode(),
        {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]


def play(example, base_url, api_key):
    """Let the model guess four times; the reward is 1 if it finds the number."""
    messages = list(example["prompt"])
    number = int(example["answer"])
    for _ in range(4):
        try:
            said = ask(base_url, api_key, messages)
        except urllib.error.HTTPError:  # no token is left for another turn
            return 0.0
        numbers = re.findall(r"[0-9]+", said["content"] or "")
        if not numbers or len(numbers[-1]) > 9:
            reply = f"Write one number from {example['low']} to {example['high']}."
        elif int(numbers[-1]) == number:
            return 1.0
        else:
            reply = "higher" if int(numbers[-1]) < number else "lower"
        messages += [said, {"role": "user", "content": reply}]
    return 0.0
