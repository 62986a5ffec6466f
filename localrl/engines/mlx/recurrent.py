"""Recurrent layers of mlx-lm's families, computed over chunks of tokens."""

from __future__ import annotations

import sys
from typing import Any

from localrl.engines.mlx.gated_delta import gated_delta_update
from localrl.engines.mlx.mamba import ssm_update


def use_chunks(model: Any) -> None:
    """Let the model's families compute gated delta nets and Mamba 2 as this package does.

    The names are rebound in the modules that define the families, where they are mlx-lm's, so this
    affects every model of these families in this process.
    """
    from mlx_lm.models import gated_delta, ssm

    ours = {gated_delta.gated_delta_update: gated_delta_update, ssm.ssm_update: ssm_update}
    for name in {type(module).__module__ for module in model.modules()}:
        family = vars(sys.modules[name])
        for stock, own in ours.items():
            if family.get(own.__name__) is stock:
                family[own.__name__] = own
