"""Locations of the models that ship with the package."""

from __future__ import annotations

from pathlib import Path

from localrl.errors import ConfigError

EMBEDDED_MODEL = "steps-0.8m"
"""Default model when none is named."""

_HOMES = {
    EMBEDDED_MODEL: ("embedded_model", "make_steps.py"),
    "turns-0.1m": ("embedded_turns", "make_turns.py"),
}
"""Folder of each model in the installed package, and the script in models/ that makes it."""

EMBEDDED_MODELS = tuple(_HOMES)
"""Names of all embedded models; `--model` accepts them too."""


def embedded_model_path(name: str = EMBEDDED_MODEL) -> Path:
    """Find the folder of an embedded model: in the installed package, else in the checkout.

    Raises: ConfigError if there is no such model, or if neither place has it.
    """
    if name not in _HOMES:
        raise ConfigError(
            f"There is no embedded model {name!r}. Choose {' or '.join(EMBEDDED_MODELS)}."
        )
    inside, script = _HOMES[name]
    package = Path(__file__).resolve().parent
    places = [package / inside, package.parent / "models" / name]
    for folder in places:
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"The embedded model {name} is in neither {places[0]} nor {places[1]}. Reinstall localrl, "
        f"make it with `python models/{script}`, or choose a model with --model."
    )
