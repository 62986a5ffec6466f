"""Model folders whose tokenizer reads every text: one token a byte, and special tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot|>", "<think>", "</think>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def folder_with(base: Path, place: Path, template: str | None = None, **changes) -> Path:
    """The folder with a tokenizer of bytes and these special tokens; eos is <|end|>.

    changes: entries of tokenizer_config.json, and `build`, which changes the tokenizer.
    """
    place.mkdir()
    build = changes.pop("build", lambda tokenizer: None)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    build(tokenizer)
    tokenizer.save(str(place / "tokenizer.json"))
    config = json.loads((base / "config.json").read_text())
    config |= {"eos_token_id": tokenizer.token_to_id("<|end|>"), "vocab_size": 300}
    (place / "config.json").write_text(json.dumps(config))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    settings |= {"chat_template": template} if template else {}
    (place / "tokenizer_config.json").write_text(json.dumps({**settings, **changes}))
    return place
