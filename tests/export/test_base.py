"""The name of the base model: from a flag, a card, or nowhere; never a path."""

from __future__ import annotations

import pytest
import tiny

from localrl.errors import ConfigError
from localrl.export.base import find_base_id

CARD = "---\nlibrary_name: {library}\nbase_model: {base}\n---\n"


@pytest.mark.parametrize(
    ("card", "bits", "name", "found"),
    [
        (CARD.format(library="mlx", base="Qwen/Qwen3-0.6B"), None, None, "Qwen/Qwen3-0.6B"),
        (CARD.format(library="mlx", base="[Qwen/Qwen3-0.6B]"), 4, None, "Qwen/Qwen3-0.6B"),
        (CARD.format(library="transformers", base="a/b"), 4, None, "a/b"),
        # Of an unquantised model it names what that was trained from.
        (CARD.format(library="transformers", base="Qwen/Qwen3-0.6B-Base"), None, None, None),
        (CARD.format(library="transformers", base="a/base"), None, "a/instruct", "a/instruct"),
        (CARD.format(library="mlx", base="/home/someone/model"), 4, None, None),
        ("---\nbase_model: [a\n---\n", 4, None, None),
        ("no front matter", 4, "mlx-community/b-4bit", None),
        (None, 4, None, None),
    ],
)
def test_the_base_models_name(tmp_path, card, bits, name, found):
    folder = tiny.make_folder(tmp_path / "model", bits=bits)
    if card is not None:
        (folder / "README.md").write_text(card)
    assert find_base_id(None, folder, name) == found
    assert find_base_id("given/name", folder, name) == "given/name"


@pytest.mark.parametrize("given", ["/abs/path", "../up", "a/b/c", "~/x", "", "a b"])
def test_a_path_is_no_base_models_name(tiny_folder, given):
    with pytest.raises(ConfigError, match="must be a Hub id"):
        find_base_id(given, tiny_folder)


def test_a_folder_is_no_base_models_name(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="not a folder"):
        find_base_id("models/mine", tiny_folder)
