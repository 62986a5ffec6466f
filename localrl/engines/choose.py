"""Choice of a model's engine, checked once per run on about 40 tokens.

Rollouts pad prompts of different lengths and fork running rows. A family of mlx-lm whose caches do
not support this would silently sample from wrong distributions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from localrl.backend import mx, tree_flatten
from localrl.engines.cpu.engine import CPUEngine
from localrl.engines.cpu.model import CPUModel, UnfitError
from localrl.engines.mlx.adapters import Siblings
from localrl.engines.mlx.engine import MLXEngine, open_engine
from localrl.engines.mlx.prefix_cache import PrefixCache, copied_positions, use_shared_prompts
from localrl.errors import ConfigError
from localrl.policy.engine import Engine
from localrl.policy.model import Policy
from localrl.policy.precision import float32_activations, float_kinds
from localrl.policy.selfcheck import Check, difference, judge

LOGGER = logging.getLogger(__name__)

FORK = (0, 1, 1)
"""Prompt that each of three rows continues, as an index of the two prompts."""
LIMITS = 1e-2, 5e-2
"""Relative errors of logits from which to warn and to refuse.

The checks compute in float32, where right logits differ by 1e-5 or less, with TF32 by 4e-3; float16
rounds those of a model of 135 million weights by 8e-3, so smaller errors than the first limit do
no more harm than that.
"""
CPU_LIMITS = 3e-4, 1e-3
"""The same for the CPU engine, which always computes in float32, and without which MLX does."""

OVERFLOW = (
    "model.dtype is fp16, which ends at 65504, and this model's hidden states come near it.",
    "Set model.dtype to auto or bf16.",
)
"""Fact and advice about float16: see `judge`."""

Logits = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Texts:
    """The tokens of the checks: two prompts of different lengths, and a token for each row."""

    prompts: tuple[tuple[int, ...], tuple[int, ...]]
    next: tuple[int, ...]

    @classmethod
    def of(cls, tokens: tuple[int, ...]) -> _Texts:
        """Cut them from at least 16 tokens."""
        return cls((tokens[:4], tokens[4:13]), tokens[13:16])


def choose_engine(
    policy: Policy,
    engine: str = "auto",
    warn: Callable[[str], None] = LOGGER.warning,
    *,
    selfcheck: str = "strict",
) -> Policy:
    """Choose the engine by comparing padded and forked rows with plain ones on about 40 tokens.

    engine: `model.engine`; with "auto" the CPU engine is used on a CPU if its logits agree.
    selfcheck: `model.selfcheck`.
    Returns the policy with its engine, which shares prompts if the family gives the same logits,
    and with the checks.

    Raises: ConfigError if the family cannot be decoded in batches or (unless `selfcheck` is "warn")
    gives different logits there, or if `engine` is "cpu" and that engine cannot compute this model.
    """
    strict = selfcheck == "strict"
    for check in policy.checks:
        if check.name == "float16_range":
            judge(check, *OVERFLOW, strict=strict, warn=warn)
    made = policy.engine
    if not isinstance(made, MLXEngine):
        made = open_engine(policy.model, policy.tokenizer.plain_tokens())
    # Layers are prepared only if this engine is chosen: that takes time, and memory for a moment.
    mlx, texts = replace(made, siblings=()), _Texts.of(made.network.probe)
    checks = _check_split(mlx, warn)
    with float32_activations(policy.model):
        expected = _plain(policy.model, texts)
        if all(np.isfinite(check.value) for check in policy.checks):  # else that was told
            _check_finite(policy.model, expected)
        for check, fact in _check_batching(mlx, texts, expected):
            checks.append(check)
            advice = "localrl would train on wrong probabilities. Use another model."
            judge(check, fact, advice, strict=strict, warn=warn)
        mlx, shared = _share_prompts(mlx, texts, expected)
    tried: list[Check] = []
    on_cpu = mx.default_device().type == mx.cpu
    chosen: MLXEngine | CPUEngine | None = None
    if engine == "cpu" or (engine == "auto" and on_cpu):
        chosen, tried = _try_cpu(
            policy.model, texts, expected, engine=engine, strict=strict, warn=warn
        )
    if chosen is None:
        chosen, prepared = _prepare(mlx, made.siblings, texts, expected, warn)
        tried += prepared
    return replace(policy, engine=chosen, checks=[*policy.checks, *checks, *shared, *tried])


def _check_finite(model: Any, logits: Logits) -> None:
    """Check that logits that are not finite do not come from weights that are not.

    Raises: ConfigError naming such weights.
    """
    if all(np.isfinite(part).all() for part in logits):
        return
    parameters: Any = tree_flatten(model.parameters())
    for name, array in parameters:
        if not mx.isfinite(array).all().item():
            raise ConfigError(
                f"The model's weights are not finite: {name} has NaN or infinity. Take its files "
                "from where the model comes from, or use another model."
            )


def _check_split(engine: MLXEngine, warn: Callable[[str], None]) -> list[Check]:
    """Return the check of body and head, if there was one; tell a value that is not a number."""
    split = engine.network.split
    if split is not None and np.isnan(split.value):
        warn(
            "body and head give logits that are not numbers where the whole model gives others, so "
            "the whole model computes them, which takes more memory"
        )
    return [] if split is None else [split]


def _check_batching(
    engine: MLXEngine, texts: _Texts, expected: Logits
) -> Iterator[tuple[Check, str]]:
    """Yield checks that the family gives the same logits in batches as for single rows.

    With each comes what a bad value shows.

    Raises: ConfigError if it cannot decode batches.
    """
    family = type(engine.network.model).__module__.rpartition(".")[2]
    try:
        found = _batched(engine, texts, None)
    except Exception as error:  # a family's own code may raise anything
        raise ConfigError(
            f"This version of mlx-lm cannot decode models of the family {family} in batches "
            f"({type(error).__name__}: {error}), so localrl cannot train them. Use another model."
        ) from error
    for name, a, b in zip(("padded prompts", "forked rows"), found, expected, strict=True):
        fact = (
            f"With this version of mlx-lm, models of the family {family} give different logits "
            f"for {name} than for single rows."
        )
        yield Check(name.replace(" ", "_"), difference(a, b), *LIMITS), fact


def _share_prompts(
    engine: MLXEngine, texts: _Texts, expected: Logits
) -> tuple[MLXEngine, list[Check]]:
    """Let rows read one copy of their prompt, if that gives the same logits.

    With the engine comes the check, if the family supports this.
    """
    model = engine.network.model
    try:
        use_shared_prompts(model)
        state = _prefill(engine, texts).fork(np.array(FORK), range(len(texts.prompts)))
        shared = [layer for layer in state.cache if isinstance(layer, PrefixCache)]
        state.step(np.array(texts.next))
        error = difference(state.logits(), expected[1])
    except Exception:  # a family's own code may raise anything; its rows then get whole caches
        return engine, []
    if not shared or not all(layer.attended for layer in shared):
        return engine, []
    check = Check("shared_prompts", error, *LIMITS)
    if not check.accepted:
        return engine, [check]
    on_cpu = mx.default_device().type == mx.cpu
    # Here caches hold float32; the run's may hold 16 bits, and twice as many positions.
    in_16_bits = not float_kinds(model) <= {mx.float32}
    copied = 0 if on_cpu else copied_positions(state.cache) * (2 if in_16_bits else 1)
    return replace(engine, shares_prompts=True, copied_positions=copied), [check]


def _prepare(
    engine: MLXEngine,
    siblings: tuple[Siblings, ...],
    texts: _Texts,
    expected: Logits,
    warn: Callable[[str], None],
) -> tuple[MLXEngine, list[Check]]:
    """Let layers with one input be computed together, if that gives the same logits."""
    layers = [layer for group in siblings for layer in group.layers]
    if not layers:
        return engine, []
    checked = tuple(replace(group, dtype=mx.float32) for group in siblings)
    with float32_activations(engine.network.model):
        pairs = zip(_batched(replace(engine, siblings=checked), texts, None), expected, strict=True)
        error = float(np.max([difference(a, b) for a, b in pairs]))
    check = Check("layers_together", error, *LIMITS)
    if not check.accepted or [g.dtype for g in checked] != [g.dtype for g in siblings]:
        for layer in layers:
            layer.prepared = None
    if check.accepted:
        return replace(engine, siblings=siblings), [check]
    warn(
        "layers computed together give different logits than one by one (relative error "
        f"{check}), so they are computed one by one, which is slower. Please report this."
    )
    return engine, [check]


def _try_cpu(
    model: Any,
    texts: _Texts,
    expected: Logits,
    *,
    engine: str,
    strict: bool,
    warn: Callable[[str], None],
) -> tuple[CPUEngine | None, list[Check]]:
    """Return the CPU engine if it gives the same logits, with copied and with shared prompts.

    With it comes the check, if it got that far.

    Raises: ConfigError if the engine does not agree and `engine` requires it.
    """
    checks: list[Check] = []
    try:
        tried = CPUEngine(CPUModel(model))
        check = _compare(tried, texts, expected)
        checks.append(check)
        if not check.accepted and (strict or engine == "auto"):
            raise ValueError(f"its logits differ from MLX's, relative error {check}")
        if check.verdict != "ok":
            warn(f"NumPy's logits differ from MLX's, relative error {check}")
        return tried, checks
    except UnfitError as error:
        why = str(error)
    except ConfigError:  # a setting that cannot be satisfied
        raise
    except Exception as error:  # a family's module may have changed
        why = f"{type(error).__name__}: {error}"
        if engine == "auto":
            warn(f"MLX computes this model, more slowly: NumPy cannot ({why}). Please report this.")
    if engine == "cpu":
        raise ConfigError(
            f"model.engine is cpu, but NumPy cannot compute this model ({why}). Set it to auto."
        )
    return None, checks


def _compare(engine: CPUEngine, texts: _Texts, expected: Logits) -> Check:
    """Compare its logits, with copied and with shared prompts, with MLX's."""
    errors = [
        difference(a, b)
        for prompts in (None, range(len(texts.prompts)))
        for a, b in zip(_batched(engine, texts, prompts), expected, strict=True)
    ]
    return Check("cpu_engine", float(np.max(errors)), *CPU_LIMITS)


def _plain(model: Any, texts: _Texts) -> Logits:
    """Logits after each prompt (2, V) and after the tokens that follow (3, V), without a cache."""
    rows = [(*texts.prompts[row], token) for row, token in zip(FORK, texts.next, strict=True)]
    logits = [np.array(model(mx.array([row]))[0].astype(mx.float32)) for row in rows]
    return np.stack([logits[0][-2], logits[1][-2]]), np.stack([row[-1] for row in logits])


def _batched(engine: Engine, texts: _Texts, prompts: Sequence[int] | None) -> Logits:
    """The same logits from one padded batch that forks. prompts: see `Prefilled.fork`."""
    prefilled = _prefill(engine, texts)
    state = prefilled.fork(np.array(FORK), prompts)
    state.step(np.array(texts.next))
    return prefilled.logits(), state.logits()


def _prefill(engine: Engine, texts: _Texts) -> Any:
    most = max(map(len, texts.prompts))
    tokens = np.array([[*p, *[0] * (most - len(p))] for p in texts.prompts], np.int32)
    return engine.prefill(tokens, [len(prompt) for prompt in texts.prompts])
