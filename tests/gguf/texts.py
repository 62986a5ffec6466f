"""Two hundred texts that tokenizers differ on: scripts, digits, spaces, code, special tokens."""

from __future__ import annotations

import numpy as np

PIECES = (
    "Hello, world! It's we'll I'D they'Ve don't o'clock",
    "The quick brown fox jumps over the lazy dog.",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }\r\n",
    "1234567890 3.14159 1,000,000 0x1F 12:30 2026-11-29 ½ ² Ⅷ ٣٤٥ 四五",
    "     five spaces, then\ttabs\t\t and  two  more   \n \n  \n",
    "naïve café Ünïcödé Straße ŒUVRE İstanbul ﬁne",
    "e\u0301 A\u030a n\u0303 composed or not",
    "漢字かな交じり文とカタカナ、한국어 문장입니다.",
    "Привет, как дела? Ещё раз: ЁЖ",
    "مرحبا بالعالم שלום עולם हिन्दी में पाठ ไทย",
    "😀👍🏽👩‍👩‍👧 🇫🇷 ♥️ →∑∞≠",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|><|im_start|>",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "https://example.org/a/b?c=d&e=f#g user@example.com",
    "...!?;:-- \u2014 \u2013 “quoted” \u2018single\u2019 «guillemets» (a)[b]{c}",
    "\u00a0non-breaking\u2003em space\u3000ideographic\u200bzero\ufeffmark",
    "camelCaseWord PascalCase snake_case SCREAMING_CASE kebab-case ABCdef",
    "\x00\x01\x1f control \x7f and \ue000 private \U0010fffd",
    "a b  c   d    e     f      g       h",
)


def texts() -> list[str]:
    """All pieces, and as many mixtures as make 200; always the same ones."""
    rng = np.random.default_rng(11)
    found = ["", " ", "\n", "a", " a", *PIECES]
    while len(found) < 200:
        chosen = [PIECES[i] for i in rng.integers(len(PIECES), size=3)]
        cuts = [piece[rng.integers(len(piece)) :][: rng.integers(1, 40)] for piece in chosen]
        found.append(rng.choice(["", " ", "\n", "  "]).join(cuts))
    return found
