"""What tests of graphs beside an offload share."""

from __future__ import annotations

from diffusers_turbo.actions.ahead import graphs_of
from diffusers_turbo.actions.calls import COMPILED

DEVICE = "cpu:0"
"""Is not "cpu": weights on it are copies, as on a GPU."""


def recorded(pipe):
    return graphs_of(vars(pipe.unet)[COMPILED])
