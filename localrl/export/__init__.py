"""Adapter files, model cards and the Hub."""

import os

# The Hub's client reads this variable once, when it is first imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
