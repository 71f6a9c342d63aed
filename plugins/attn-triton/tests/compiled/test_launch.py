"""What the driver is given: a first launch looks at its arguments, later ones do not, and give the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attn_triton.kernels.write import tree_depth_kernel
from attn_triton.launch import Bound, Direct, Launcher

DEVICE = torch.device("cpu")


class Recording(Launcher):
    """A launcher whose driver keeps what it is given; ``built`` are the patterns that were compiled."""

    __slots__ = ("built", "given")

    def __init__(self) -> None:
        super().__init__(tree_depth_kernel, {"Q_PADDED": 4}, {"num_warps": 1}, DEVICE)
        self.built: list[frozenset[int]] = []
        self.given: list[tuple[Any, ...]] = []

    def build(self, args: Sequence[Any], odd: frozenset[int]) -> Direct:
        self.built.append(odd)
        return Direct(lambda *given: self.given.append(given), ("function", "flags"))


def test_every_launch_gives_the_driver_what_is_bound_now() -> None:
    launcher, depths = Recording(), torch.zeros(4, dtype=torch.int32)
    trees = [torch.zeros(1, 4, 4, dtype=torch.uint8) for _ in range(3)]
    bound = Bound(launcher, [trees[0], depths, 4], moving=(0,))
    for tree in trees:
        bound.place(tree)
        bound.launch(4, 2)
    stream = 0
    assert launcher.given == [
        (4, 2, 1, stream, "function", "flags", tree.data_ptr(), depths.data_ptr(), 4, 4) for tree in trees
    ]
    assert launcher.built == [frozenset()]


def test_an_address_that_is_no_multiple_of_16_has_a_kernel_of_its_own() -> None:
    launcher, depths = Recording(), torch.zeros(4, dtype=torch.int32)
    room = torch.zeros(33, dtype=torch.uint8)
    even, odd = room[:16].view(1, 4, 4), room[1:17].view(1, 4, 4)
    bound = Bound(launcher, [even, depths, 4], moving=(0,))
    for tree in (even, odd, even, odd):
        bound.place(tree)
        bound.launch(4)
    assert launcher.built == [frozenset(), frozenset({0})]
    assert [given[6] for given in launcher.given] == [tree.data_ptr() for tree in (even, odd, even, odd)]


def test_no_programs_are_no_launch() -> None:
    launcher = Recording()
    Bound(launcher, [torch.zeros(16, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32), 4]).launch(0)
    assert launcher.given == []
