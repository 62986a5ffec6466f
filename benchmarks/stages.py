"""The stages that arms may name: rivals, and ideas that are not settings of the product."""

from __future__ import annotations

from allocation import Allocation
from deciding import ending_early
from distillation import RULES, with_distillation
from options import OVER, with_options
from prefixes import STAGES, with_prefixes
from rivals import instead, with_rival
from taught import TAUGHT, with_teacher

from localrl.training.session import Session


def with_stages(session: Session, names: str | None) -> Session:
    """Return the session with the stages of these names, joined by " + "; None: as it is."""
    for name in names.split(" + ") if names else ():
        session = _with(session, name)
    return session


def _with(session: Session, name: str) -> Session:
    if name in STAGES:
        return with_prefixes(session, STAGES[name])
    if name in RULES:
        return with_distillation(session, name)
    if name == TAUGHT:
        return with_teacher(session)
    if name in OVER:
        return with_options(session, name)
    if name == "allocation":
        session.sampler = instead(Allocation, session.sampler)
        return session
    if name == "early end":
        return ending_early(session)
    return with_rival(session, name)
