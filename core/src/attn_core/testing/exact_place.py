"""Where the oracle computes and compares: on the host, whatever the device.

Some devices have no fp64 (NPUs, many XPUs). On those that have, its hundreds of small operators take longer to launch
than a processor takes to compute them, and what an earlier kernel did to the device must not judge it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from attn_core.runtime.batch import ForwardBatch, TreeMask


def exact_place(device: torch.device) -> torch.device:
    """The device on which tensors of ``device`` are computed with in fp64."""
    return device if device.type == "meta" else torch.device("cpu")


def placed_batch(batch: ForwardBatch) -> ForwardBatch:
    """The batch with its tensors where fp64 is; the same object where they are there already."""
    place = exact_place(batch.device)
    if place == batch.device:
        return batch
    given = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved: dict[str, Any] = {name: value.to(place) for name, value in given.items() if isinstance(value, Tensor)}
    tree = None if batch.tree is None else TreeMask(batch.tree.visible.to(place))
    return replace(batch, **moved, tree=tree, plan_state=None)
