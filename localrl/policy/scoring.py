"""Log-probabilities of given tokens under the policy, with gradient."""

from __future__ import annotations

from localrl.backend import mx
from localrl.policy.model import Policy


def token_logprobs(
    policy: Policy,
    tokens: mx.array,
    sources: mx.array,
    targets: mx.array,
    *,
    temperature: float,
    head_chunk: int,
) -> mx.array:
    """Float32 log-probabilities (N,) of `targets`, each predicted at its flat position `sources`.

    `tokens` is (B, L). The head runs on the N positions alone, `head_chunk` of them at a time; each
    chunk's logits are made again for the gradient instead of being kept. The distribution is that
    of the sampler: logits divided by the temperature, over the whole vocabulary.
    """
    if policy.hidden is None or policy.head is None:
        logits = policy.model(tokens)  # (B, L, V)
        flat = logits.reshape(-1, logits.shape[-1])[sources]
        return _gather_logprobs(flat, targets, temperature)
    states = policy.hidden(tokens)  # (B, L, d)
    states = states.reshape(-1, states.shape[-1])[sources]  # (N, d)
    return mx.concatenate(
        [
            _chunk_logprobs(
                policy, states[i : i + head_chunk], targets[i : i + head_chunk], temperature
            )
            for i in range(0, states.shape[0], head_chunk)
        ]
    )


def _chunk_logprobs(
    policy: Policy, states: mx.array, targets: mx.array, temperature: float
) -> mx.array:
    head = policy.head
    assert head is not None

    def score(chunk: mx.array) -> mx.array:
        # Targets are captured: an integer index cannot be an argument of a function with gradient.
        return _gather_logprobs(head(chunk), targets, temperature)

    return mx.checkpoint(score)(states)


def _gather_logprobs(logits: mx.array, targets: mx.array, temperature: float) -> mx.array:
    logits = logits.astype(mx.float32) / temperature  # (N, V)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)
