"""The stages of learning_arms.py by name."""

from __future__ import annotations

from distillation import RULES, with_distillation
from options import OVER, with_options
from rivals import with_rival

from localrl.training.session import Session


def with_stage(session: Session, name: str | None) -> Session:
    """Return the session with the stages of this name; None: as it is."""
    if name in RULES:
        return with_distillation(session, name)
    if name in OVER:
        return with_options(session, name)
    return with_rival(session, name)
