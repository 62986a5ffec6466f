"""Completions that end early: repetition and the stop text are found at the right token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrl.errors import ConfigError
from localrl.policy.tokenizer import Tokenizer, load_tokenizer
from localrl.rollouts.batch import Segment, TreeRequest
from localrl.rollouts.decode import Decoder, LiveView
from localrl.rollouts.stops import LONGEST_TEXT, RecentTokens, Stops, make_stops
from localrl.utils.repetition import repeated_from

NEVER = "@@@"
"""A text that the tiny model cannot write."""


@pytest.fixture(scope="module")
def rules(tiny_folder) -> Stops:
    stops = make_stops(load_tokenizer(tiny_folder), loops=True, texts=())
    assert stops is not None
    return stops


def window(period: int) -> int:
    return max(3 * period, 48)


def loops_now(tokens: Sequence[int]) -> bool:
    """The definition, token by token."""
    for period in range(1, 65):
        tail = list(tokens[-window(period) :])
        periodic = all(a == b for a, b in zip(tail, tail[period:], strict=False))
        if len(tail) == window(period) and periodic:
            return True
    return False


def push(tails: RecentTokens, *tokens: int) -> list[bool]:
    tails.push(np.array(tokens, np.uint32))
    return tails.loops().tolist()


def found_after(stops: Stops, streams: Sequence[Sequence[int]]) -> list[int | None]:
    """For each stream, all in one batch, the number of tokens after which it is a loop."""
    tails = stops.begin([()] * len(streams))
    found: list[int | None] = [None] * len(streams)
    for t in range(max(map(len, streams))):
        # A stream that has ended goes on with tokens that never come again.
        looped = push(tails, *(s[t] if t < len(s) else 10_000 + t for s in streams))
        for row, hit in enumerate(looped):
            found[row] = t + 1 if hit and found[row] is None else found[row]
    return found


def cycle(period: int, length: int) -> list[int]:
    """Different tokens over and over."""
    return [100 + t % period for t in range(length)]


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


def table(rows: int, seed: int = 0) -> list[int]:
    draws = np.random.default_rng(seed).integers(0, 100, (rows, 3))
    return codes("".join(f"{a} {b} {c}\n" for a, b, c in draws))


HEAD = [1, 2, 3, 4, 5]
STREAMS: dict[str, tuple[list[int], int | None]] = {
    "one token": (HEAD + cycle(1, 60), 5 + 48),
    "one token from the start": (cycle(1, 60), 48),
    "seven tokens": (HEAD + cycle(7, 60), 5 + 48),
    "seventeen tokens": (HEAD + cycle(17, 90), 5 + 51),
    "sixty-four tokens": (HEAD + cycle(64, 200), 5 + 192),
    "sixty-five tokens": (HEAD + cycle(65, 400), None),
    "a token short": (HEAD + cycle(7, 47), None),
    "begun anew": ([*cycle(1, 47), 9, *cycle(1, 50)], 48 + 48),
    "zeros in a table": (codes("".join(f"{n} 00000000000000 {n * 7}\n" for n in range(40))), None),
    "a long number": (codes("x = 1" + "0" * 46 + ";\n" + "y = 3"), None),
    "a table": (table(80), None),
    "a counter": (codes("".join(f"line {n}\n" for n in range(100, 200))), None),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_loop_is_found_at_the_right_token(rules, name):
    stream, expected = STREAMS[name]
    assert found_after(rules, [stream]) == [expected]


def test_rows_do_not_disturb_each_other(rules):
    streams, expected = zip(*STREAMS.values(), strict=True)
    assert found_after(rules, streams) == list(expected)


@pytest.mark.parametrize("period", [1, 7, 24])
def test_one_other_token_is_no_loop(rules, period):
    streams = [cycle(period, window(period)) for _ in range(window(period))]
    for place, stream in enumerate(streams):
        stream[place] = 7
    assert found_after(rules, streams) == [None] * len(streams)


def test_the_detector_is_the_definition(rules):
    rng = np.random.default_rng(1)
    tails = rules.begin([()] * 20)
    streams: list[list[int]] = [[] for _ in range(20)]
    hits = 0
    for _ in range(300):
        for row, stream in enumerate(streams):
            lag = 1 + row * 2
            new = int(rng.integers(3))
            stream.append(stream[-lag] if len(stream) >= lag and rng.random() > 0.01 else new)
        expected = [loops_now(stream) for stream in streams]
        assert push(tails, *(stream[-1] for stream in streams)) == expected
        hits += sum(expected)
    assert 100 < hits < 5900


def test_forks_copy_the_state_and_leave_each_other_alone(rules):
    tails = rules.begin([()] * 2)
    for t in range(40):
        push(tails, 5, t)
    tails.take(np.array([0, 1, 0]))
    for _ in range(7):
        assert push(tails, 5, 6, 5) == [False] * 3
    assert push(tails, 5, 6, 9) == [True, False, False]
    tails.take(np.array([2, 0]))
    assert push(tails, 5, 5) == [False, True]


def test_joined_batches_keep_their_states(rules):
    tails, fresh = rules.begin([()]), rules.begin([()] * 2)
    for _ in range(47):
        push(tails, 5)
    for t in range(40):
        push(fresh, 7 + t % 2, t)
    tails.extend(fresh)
    assert push(tails, 5, 7, 0) == [True, False, False]
    for t in range(41, 47):
        assert push(tails, 5, 7 + t % 2, t) == [True, False, False]
    assert push(tails, 5, 8, 0) == [True, True, False]


# Rows that begin with tokens of their prompt.


BEFORE = (cycle(1, 60), [], HEAD + cycle(7, 30), [9], table(40), cycle(64, 200))
AFTER = ([100] * 9, [1] * 60, cycle(7, 60)[2:], [9] * 50, table(20), cycle(64, 80)[8:])


def test_beginning_with_tokens_is_pushing_them_one_by_one(rules):
    together = rules.begin(BEFORE)
    for row, (before, after) in enumerate(zip(BEFORE, AFTER, strict=True)):
        alone = rules.begin([()])
        for token in before:
            push(alone, token)
        one = rules.begin([()] * row + [before])
        for tails in (together, one):
            np.testing.assert_array_equal(tails.recent[row], alone.recent[0])
            if before:
                np.testing.assert_array_equal(tails.runs[row], alone.runs[0])
        push(alone, after[0])
        one.push(np.array([after[0]] * (row + 1)))
        np.testing.assert_array_equal(one.runs[row], alone.runs[0])


def test_loops_are_counted_from_the_tokens_before_on(rules):
    tails = rules.begin(BEFORE)
    found: list[int | None] = [None] * len(BEFORE)
    for t in range(50):
        looped = push(tails, *(after[t] if t < len(after) else 10_000 + t for after in AFTER))
        for row, hit in enumerate(looped):
            whole = BEFORE[row] + AFTER[row][: t + 1]
            assert hit == (t < len(AFTER[row]) and loops_now(whole))
            found[row] = t + 1 if hit and found[row] is None else found[row]
    # At once; 48 tokens of its own; 30 of 48 before; 1 of 48 before; never; at once.
    assert found == [1, 48, 18, 47, None, 1]


# Where what repeats has been said twice.


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (HEAD + cycle(1, 48), 5 + 2),
        (cycle(1, 300), 2),
        (HEAD + cycle(7, 48), 5 + 14),
        (HEAD + cycle(7, 75), 5 + 14),
        (HEAD + cycle(64, 192), 5 + 128),
        (HEAD + cycle(64, 191), None),
        (HEAD + cycle(65, 400), None),
        ([*cycle(1, 60), 3], None),
        (cycle(1, 47), None),
        (table(80), None),
        (HEAD, None),
        ([], None),
        # The tail may begin within what came before it.
        ([101, *cycle(2, 60)], 4),
    ],
)
def test_where_a_loop_begins_to_say_nothing_new(tokens, expected):
    assert repeated_from(np.array(tokens, np.int32)) == expected


def test_a_loop_that_was_found_has_such_a_place(rules):
    for stream, found in STREAMS.values():
        if found is not None:
            place = repeated_from(np.array(stream[:found], np.int32))
            assert place is not None
            assert 2 <= place < found
            assert repeated_from(np.array(stream, np.int32)) == place


# The stop text.


@cache
def byte_tokenizer(vocabulary: int, corpus: str) -> Tokenizer:
    """A byte-level tokenizer with merges learned from the corpus."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Rust(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([corpus], trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner), frozenset())


def metaspace_tokenizer() -> Tokenizer:
    """A tokenizer that drops the space before the first word, with bytes for what it lacks."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "▁a", "b", "▁end", ".▁"]
    inner = Rust(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner), frozenset())


def check_closed(tokenizer: Tokenizer, texts: str | Sequence[str], ids: Sequence[int]) -> int:
    """Closed exactly when the text so far holds a stop text; the number of tokens before it."""
    texts = [texts] if isinstance(texts, str) else texts
    stops = make_stops(tokenizer, loops=False, texts=texts)
    assert stops is not None
    tails = stops.begin([(), ()])
    for t, token in enumerate(ids):
        # The second row writes the same, but has ended.
        tokens, alive = np.array([token, token], np.uint32), np.array([True, False])
        ended = stops.ended(tails, tokens, alive)
        holds = any(text in tokenizer.decode(ids[: t + 1]) for text in texts)
        assert ended["closed"].tolist() == [holds, False]
        assert not ended["loop"].any()
        if holds:
            return t
    raise AssertionError("never closed")


ANSWER = "so <answer> 42</answer>.\n\nThe answer> is </answer, or</answer> again"


@pytest.mark.parametrize("vocabulary", [256, 270, 300, 330])
@pytest.mark.parametrize("text", ["</answer>", "\n\n", "is ", "42", "n"])
def test_the_stop_text_closes_however_it_is_cut(vocabulary, text):
    tokenizer = byte_tokenizer(vocabulary, ANSWER)
    check_closed(tokenizer, text, tokenizer.inner.encode(ANSWER))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    places=st.lists(
        st.tuples(st.integers(0, len(ANSWER) - 1), st.integers(1, 14)), min_size=1, max_size=5
    ),
    vocabulary=st.sampled_from([256, 300, 330]),
)
def test_the_first_of_several_stop_texts_closes(places, vocabulary):
    tokenizer = byte_tokenizer(vocabulary, ANSWER)
    texts = [ANSWER[begin : begin + size] for begin, size in places]
    ids = tokenizer.inner.encode(ANSWER)
    alone = [check_closed(tokenizer, text, ids) for text in texts]
    assert check_closed(tokenizer, [*texts, "never", "x" * LONGEST_TEXT], ids) == min(alone)


def test_text_after_the_stop_text_in_the_same_token_closes_too():
    tokenizer = byte_tokenizer(330, ANSWER)
    ids = tokenizer.inner.encode(ANSWER)
    place = check_closed(tokenizer, "</ans", ids)
    assert not tokenizer.decode(ids[: place + 1]).endswith("</ans")


@pytest.mark.parametrize("text", ["完", "終了", "é»"])
def test_a_character_cut_into_bytes_closes(text):
    tokenizer = byte_tokenizer(256, "")
    ids = tokenizer.inner.encode(f"ü 完é終 {text}ü")
    check_closed(tokenizer, text, ids)


@pytest.mark.parametrize("vocabulary", [256, 330])
def test_a_stop_text_begun_in_the_tokens_before_closes(vocabulary):
    tokenizer = byte_tokenizer(vocabulary, ANSWER)
    ids = tokenizer.inner.encode(ANSWER)
    stops = make_stops(tokenizer, loops=False, texts=["</answer>"])
    assert stops is not None
    place = check_closed(tokenizer, "</answer>", ids)
    for cut in range(place + 1):
        tails = stops.begin([ids[:cut], ()])
        for t in range(cut, place + 1):
            ended = stops.ended(tails, np.array([ids[t]] * 2), np.ones(2, bool))
            alone = "</answer>" in tokenizer.decode(ids[cut : t + 1])
            assert ended["closed"].tolist() == [t == place, alone]


def test_a_tokenizer_that_drops_first_spaces():
    tokenizer = metaspace_tokenizer()
    vocabulary = tokenizer.inner.get_vocab()
    ids = [vocabulary[piece] for piece in ("b", "▁end", "▁a", "b", ".▁", "▁a", "▁")]
    for text in ("d a", "b. ", "end", " ", "b. "):
        check_closed(tokenizer, text, ids)
    bytes_of = [vocabulary[f"<0x{n:02X}>"] for n in "x>é".encode()]
    check_closed(tokenizer, ">é", [*ids, *bytes_of])


def test_the_embedded_models_tokenizer():
    from localrl.embedded import embedded_model_path

    tokenizer = load_tokenizer(embedded_model_path())
    ids = tokenizer.inner.encode("12+30=42;#=42", add_special_tokens=False)
    assert check_closed(tokenizer, "#=42", ids) == len(ids) - 1


def test_what_is_wanted_decides_what_is_made(tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    assert make_stops(tokenizer, loops=False, texts=()) is None
    assert make_stops(tokenizer, loops=False, texts=["a" * LONGEST_TEXT, "b"]) is not None
    for wrong in ("a" * (LONGEST_TEXT + 1), ""):
        with pytest.raises(ConfigError, match=f"1 to {LONGEST_TEXT} bytes; .* holds {wrong!r}"):
            make_stops(tokenizer, loops=True, texts=["b", wrong])


# Decoding.


TEXTS = ("12", "sum 1 2 3", "a", "zebra 99", "sort cab", "a" * 60)


@dataclass(frozen=True)
class Path:
    """A completion, and where its last segment began."""

    ids: list[int]
    logprobs: np.ndarray
    end: str
    last: int


@dataclass
class ForkAt:
    """Fork when a path has this many tokens."""

    length: int

    def choose(self, view: LiveView) -> np.ndarray:
        return view.alive & (view.lengths == self.length) & (view.leaves_left > 0)


def decode(policy, stops, *, temperature=1.0, rows=64, tokens=100, roots=2, fork=None):
    requests = [
        TreeRequest(
            prompt=p,
            address=(0, 1, text),
            roots=roots,
            leaves=2 * roots if fork else roots,
            max_tokens=tokens,
        )
        for p, text in enumerate(TEXTS)
    ]
    prompts = [policy.tokenizer.encode([{"role": "user", "content": text}]) for text in TEXTS]
    decoder = Decoder(policy, temperature, rows, stops=stops)
    segments = decoder.decode(prompts, requests, ForkAt(fork) if fork else None)
    return [path(segments, i) for i, s in enumerate(segments) if s.end != "fork"]


def path(segments: Sequence[Segment], index: int) -> Path:
    chain = [segments[index]]
    while chain[0].parent >= 0:
        chain.insert(0, segments[chain[0].parent])
    ids = [int(token) for segment in chain for token in segment.token_ids]
    logprobs = np.concatenate([segment.logprobs for segment in chain])
    return Path(ids, logprobs, chain[-1].end, len(ids) - len(chain[-1].token_ids))


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a.ids, a.end) == (b.ids, b.end)
        assert np.array_equal(a.logprobs, b.logprobs)


@pytest.mark.exact
@pytest.mark.parametrize(("rows", "loops"), [(5, True), (64, False)])
def test_rules_that_never_apply_change_nothing(policy, rows, loops):
    free = decode(policy, None, rows=rows)
    stops = make_stops(policy.tokenizer, loops=loops, texts=[NEVER])
    assert_same(decode(policy, stops, rows=rows), free)
    assert {p.end for p in free} == {"stop", "length"}


def first_loop(ids: Sequence[int]) -> int | None:
    return next((n for n in range(1, len(ids) + 1) if loops_now(ids[:n])), None)


@pytest.mark.parametrize("rows", [5, 64])
def test_a_loop_ends_its_completion_and_changes_nothing_before(policy, rows):
    stops = make_stops(policy.tokenizer, loops=True, texts=())
    free = decode(policy, None, temperature=0.2)
    seen = set()
    for whole, part in zip(free, decode(policy, stops, temperature=0.2, rows=rows), strict=True):
        end = first_loop(whole.ids)
        assert part.ids == whole.ids[:end]
        assert part.end == (whole.end if end is None else "loop")
        np.testing.assert_allclose(part.logprobs, whole.logprobs[:end], atol=1e-4)
        seen.add((part.end, len(part.ids) > 48))
    assert {("loop", False), ("loop", True)} <= seen
    assert seen & {("stop", True), ("stop", False), ("length", True)}


def test_a_loop_that_began_before_a_fork_is_found_after_it(policy):
    stops = make_stops(policy.tokenizer, loops=True, texts=())
    paths = decode(policy, stops, temperature=0.001, fork=30)
    assert {p.last for p in paths} == {30}
    assert {p.end for p in paths} == {"loop"}
    assert min(len(p.ids) for p in paths) < 30 + 48
    # None is found too early, so the prompt of one letter over and over does not count.
    assert all(first_loop(p.ids) == len(p.ids) for p in paths)


def middle(policy, paths, begin, end):
    """The text of some completion between two places, which no token before has completed."""
    read = policy.tokenizer.decode
    for p in paths:
        text = read(p.ids[begin:end])
        if len(text) == end - begin and text not in read(p.ids[: end - 1]):
            return text
    raise AssertionError("no completion is long enough")


@pytest.mark.parametrize("rows", [3, 64])
def test_the_stop_text_ends_its_completion_and_changes_nothing_before(policy, rows):
    sizes = {"roots": 6, "temperature": 0.7, "tokens": 40}
    free = decode(policy, None, **sizes)
    text = middle(policy, free, 5, 7)
    stops = make_stops(policy.tokenizer, loops=True, texts=[text])
    read = policy.tokenizer.decode
    closed = 0
    for whole, part in zip(free, decode(policy, stops, rows=rows, **sizes), strict=True):
        assert part.ids == whole.ids[: len(part.ids)]
        np.testing.assert_allclose(part.logprobs, whole.logprobs[: len(part.ids)], atol=1e-4)
        assert (part.end == "closed") == (text in read(part.ids))
        assert text not in read(part.ids[:-1])
        assert part.end in ("closed", "loop") or part.ids == whole.ids
        closed += part.end == "closed"
    assert 0 < closed < len(free)


def test_a_stop_text_begun_before_a_fork_is_found_after_it(policy):
    text = middle(policy, decode(policy, None, fork=10), 7, 12)
    stops = make_stops(policy.tokenizer, loops=False, texts=[text])
    paths = decode(policy, stops, fork=10)
    across = [p for p in paths if p.end == "closed" and p.last == 10 and len(p.ids) == 12]
    assert across
    assert all(policy.tokenizer.decode(p.ids).endswith(text) for p in across)


def test_the_reasons_have_an_order(policy):
    def first(policy, stops, tokens):
        return decode(policy, stops, temperature=0.001, tokens=tokens, roots=1)[0]

    free = first(policy, None, 100)
    length = first_loop(free.ids)
    # The last token allowed is the one with which the path becomes a loop.
    loops = make_stops(policy.tokenizer, loops=True, texts=())
    assert length is not None
    assert first(policy, None, length).end == "length"
    assert first(policy, loops, length).end == "loop"

    last = free.ids[length - 1]
    letter = policy.tokenizer.decode([last])
    both = make_stops(policy.tokenizer, loops=True, texts=[letter * 48])
    closed = first(policy, both, length)
    assert (closed.end, closed.ids) == ("closed", free.ids[:length])

    ends = replace(policy, tokenizer=replace(policy.tokenizer, end_ids=frozenset([last])))
    one = make_stops(policy.tokenizer, loops=True, texts=[letter])
    stopped = first(ends, one, length)
    assert (stopped.end, stopped.ids) == ("stop", free.ids[: free.ids.index(last) + 1])
