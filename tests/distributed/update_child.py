"""One update of a step's batch, by one rank of several or by a process alone; saves what it did."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from steps import TEMPERATURE, plan, ragged_group, selection
from tiny import make_tiny_policy

from localrl.backend import tree_flatten
from localrl.distributed.collective import join
from localrl.distributed.launch import find_place
from localrl.distributed.shard import shard_batch
from localrl.learning.objectives import make_objective
from localrl.learning.update import Updater
from localrl.records import ScoredGroup
from localrl.settings import LearningConfig

out, prompts = Path(sys.argv[1]), int(sys.argv[2])
place = find_place()
config = LearningConfig(lr=1e-3, kl_coef=0.05, warmup_steps=0)
lengths = ([5, 9, 3, 12], [2, 2, 17], [8, 1], [4, 4, 4, 4, 4], [11, 6])[:prompts]
groups = [
    ScoredGroup(group, tuple(float(i % 2) for i in range(len(group.leaves))), {})
    for group in (ragged_group(one, 4 + 3 * n) for n, one in enumerate(lengths))
]
name = "alone" if place is None else f"rank-{place.rank}"
policy = make_tiny_policy(out / f"model-{name}")
batch = selection(make_objective(config), groups).batch
with contextlib.ExitStack() as stack:
    updater = Updater(policy, config, TEMPERATURE)
    mine = batch
    if place is not None:
        updater.gradient.ranks, _ = stack.enter_context(join(place))
        mine = shard_batch(batch, updater.gradient.ranks.rank, updater.gradient.ranks.size)
    gradient, _ = updater.gradient(mine, plan())
    stats = [asdict(updater.update(batch, plan())) for _ in range(3)]
arrays = {f"gradient/{name}": np.array(a) for name, a in tree_flatten(gradient)}
adapters = tree_flatten(policy.model.trainable_parameters())
arrays |= {f"adapter/{name}": np.array(a) for name, a in adapters}
np.savez(out / f"{name}.npz", **arrays)
(out / f"{name}.json").write_text(json.dumps(stats))
