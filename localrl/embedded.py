"""Where the model that ships with the package is."""

from __future__ import annotations

from pathlib import Path

from localrl.errors import ConfigError

EMBEDDED_MODEL = "steps-0.8m"


def embedded_model_path() -> Path:
    """The folder of the embedded model: in the installed package, else in the checkout beside it.

    Raises `ConfigError` when neither has it.
    """
    package = Path(__file__).resolve().parent
    places = [package / "embedded_model", package.parent / "models" / EMBEDDED_MODEL]
    for folder in places:
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"The embedded model {EMBEDDED_MODEL} is in neither {places[0]} nor {places[1]}; reinstall "
        "localrl, make it with `python models/make_steps.py`, or name a model with --model."
    )
