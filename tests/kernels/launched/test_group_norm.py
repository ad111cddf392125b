"""GroupNorm against plain PyTorch: every way, every number of channels a group, and inputs that break weaker ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusers_turbo.kernels.group_norm import GroupNormLaunch, group_norm, group_norm_launch, group_norm_plain
from diffusers_turbo.kernels.group_norm_device import row_start
from diffusers_turbo.kernels.lazy import jit
from tests.kernels.checking import DTYPES, check, image, largest_error, randn

# SD1.5 and SDXL UNets: 10 to 80; VAEs: 4, 8, 16; and odd ones.
GROUP_WIDTHS = (1, 3, 4, 7, 8, 10, 16, 20, 30, 40, 60, 80)

HELD = GroupNormLaunch(split=False, held=True, block=2048, warps=4)
# So small that a little image takes several turns of every loop, and ends within one.
SINGLE = GroupNormLaunch(split=False, block=512, warps=4)
SPLIT = GroupNormLaunch(split=True, rows=8, columns=128, tile_rows=16, finish_block=128, finish_warps=4)
every_way = pytest.mark.parametrize("launch", [HELD, SINGLE, SPLIT], ids=["held", "single", "split"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_way
@pytest.mark.parametrize("width", GROUP_WIDTHS)
def test_every_number_of_channels_a_group(width, launch, device):
    """One dtype: each is converted where it is loaded and stored, and the next test has them all."""
    channels, dtype = 2 * width, torch.float16
    x = image(2, channels, 5, 5, dtype=dtype, device=device)
    weight, bias = randn(2, channels, dtype=dtype, device=device)
    output = check("group_norm", x, 2, weight, bias, silu=True, launch=launch)
    assert output.stride() == x.stride()


@every_way
@every_dtype
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
def test_with_and_without_silu_and_embedding(silu, embedded, dtype, launch, device):
    x = image(2, 20, 5, 4, dtype=dtype, device=device)
    weight, bias = randn(2, 20, dtype=dtype, device=device)
    add = randn(2, 20, dtype=dtype, device=device, seed=9) * 3 if embedded else None
    check("group_norm", x, 2, weight, bias, 1e-6, silu=silu, add=add, launch=launch)


@every_way
@every_dtype
@pytest.mark.parametrize("embedded", [False, True])
def test_the_bias_of_the_convolution_before(embedded, dtype, launch, device):
    x = image(2, 20, 5, 4, dtype=dtype, device=device)
    before, add = randn(20, dtype=dtype, device=device, seed=3) * 3, randn(2, 20, dtype=dtype, device=device, seed=9)
    given = {"silu": True, "before": before, "add": add if embedded else None}
    check("group_norm", x, 2, *randn(2, 20, dtype=dtype, device=device), launch=launch, **given)


@every_way
@pytest.mark.parametrize("rows", ["stripes", "one for all"])
def test_an_embeddings_rows_may_lie_anywhere(rows, launch, device):
    x, wide = image(3, 20, 5, 4, device=device), randn(3, 90, device=device, seed=9) * 3
    add = wide[:, 33:53] if rows == "stripes" else wide[:1, 33:53].expand(3, -1)
    check("group_norm", x, 2, silu=True, add=add, launch=launch)


@every_way
@every_dtype
def test_a_mean_far_larger_than_the_deviation(dtype, launch, device):
    """E[x^2] - E[x]^2 has no correct digit left here: see the test below."""
    ratio = {torch.float32: 1e4, torch.float16: 250, torch.bfloat16: 33}[dtype]
    x = ((randn(2, 7, 5, 40) / ratio - 1) * 30000).to(device=device, dtype=dtype).movedim(-1, 1)
    check("group_norm", x, 4, launch=launch, strain=ratio)


def test_a_mean_that_cancels_in_the_sum_of_squares():
    """What the test above would catch."""
    x = (randn(1, 4, 9, 9) / 1e4 + 1) * 30000
    naive = (x - x.mean()) / (x.square().mean() - x.mean() ** 2).clamp(min=0).add(1e-5).sqrt()
    truth = group_norm_plain(x.double(), 1)
    assert largest_error(naive, truth) > 1e-1


@every_way
def test_an_embedding_far_larger_than_the_deviation(launch, device):
    x, add = image(2, 40, 5, 5, device=device), randn(2, 40, device=device) * 1000
    check("group_norm", x, 4, add=add, launch=launch)


@every_way
@pytest.mark.parametrize("shape", [(2, 12), (2, 12, 1, 1), (1, 12, 33), (2, 12, 1, 17), (1, 12, 2, 3, 5)], ids=str)
def test_every_rank(shape, launch, device):
    x = image(*shape, device=device)
    output = check("group_norm", x, 2, launch=launch)
    assert output.stride() == x.stride()


@every_way
def test_weights_of_another_dtype(launch, device):
    x = image(2, 12, 3, 3, dtype=torch.float16, device=device)
    weight, bias = randn(2, 12, device=device)
    output = group_norm(x, 2, weight, bias, launch=launch)
    truth = group_norm_plain(x.double(), 2, weight.double(), bias.double())
    assert largest_error(output, truth) < 5.2e-4
    assert torch.equal(group_norm(x, 2, weight, launch=launch), group_norm(x, 2, weight, 0 * bias, launch=launch))


@every_way
def test_a_constant_image_is_its_bias(launch, device):
    x = torch.full((1, 12, 4, 4), 7.0, device=device).to(memory_format=torch.channels_last)
    bias = randn(12, device=device)
    expected = bias[:, None, None].expand(1, 12, 4, 4)
    assert torch.allclose(group_norm(x, 2, None, bias, launch=launch), expected, atol=1e-6)


@every_way
def test_a_sample_has_the_same_bits_in_any_batch(launch, device):
    x, add = image(3, 24, 5, 5, device=device), randn(3, 24, device=device)
    together = group_norm(x, 2, silu=True, add=add, launch=launch)
    assert torch.equal(together[1:2], group_norm(x[1:2], 2, silu=True, add=add[1:2], launch=launch))


def test_by_the_rule_alone(device):
    """Without `launch`: an image that one program a group holds, one that it reads twice, and one by tiles."""
    for sides, way in (((6, 6), (False, True)), ((31, 17), (False, False)), ((33, 32), (True, False))):
        x = image(1, 33, *sides, dtype=torch.float16, device=device)
        launch = group_norm_launch(33, sides[0] * sides[1], 1)
        assert (launch.split, launch.held) == way
        check("group_norm", x, 1, silu=True)


def test_a_launch_that_holds_less_than_a_group_reads_it_twice(device):
    x = image(1, 24, 9, 9, device=device)
    check("group_norm", x, 1, launch=replace(HELD, block=256))


def test_a_group_with_more_channels_than_a_program_holds_is_split(device):
    x = image(1, 24, 3, 3, device=device)
    check("group_norm", x, 1, *randn(2, 24, device=device), launch=replace(SINGLE, block=16, warps=1))


def test_of_nothing(device):
    assert group_norm(torch.empty(0, 4, 3, 3, device=device), 2).shape == (0, 4, 3, 3)


@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 4),
    width=st.integers(1, 24),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    silu=st.booleans(),
    launch=st.builds(
        GroupNormLaunch,
        split=st.booleans(),
        held=st.booleans(),
        block=st.sampled_from([64, 512]),
        rows=st.sampled_from([1, 4, 16]),
        columns=st.sampled_from([8, 64]),
        tile_rows=st.sampled_from([1, 5, 16, 50]),
        finish_block=st.sampled_from([16, 256]),
    ),
)
def test_any_shape_and_cut(batch, groups, width, sides, silu, launch, device):
    """Even a tile that is no multiple of what a program holds at once."""
    if batch * width * sides[0] * sides[1] == 1:
        return  # PyTorch refuses to normalise a single value
    launch = replace(launch, warps=1, tile_warps=1, finish_warps=1)
    if launch.held:
        launch = replace(launch, block=2048)
    x = image(batch, groups * width, *sides, device=device)
    weight, bias = randn(2, groups * width, device=device)
    # With few values in a group their mean may lie many deviations away from zero.
    check("group_norm", x, groups, weight, bias, silu=silu, launch=launch, strain=4, compare=False)


@jit("batch", "row", "rows", "width")
def where_kernel(output, batch, row, rows, width):
    tl.store(output, row_start(batch, row, rows, width))  # noqa: F821


@pytest.mark.parametrize(
    ("batch", "row", "rows", "width"), [(1, 5, 2**24, 256), (0, 2**24 - 1, 2**24, 320), (3, 7, 11, 13)]
)
def test_rows_past_2_31_elements_are_found(batch, row, rows, width, device):
    output = torch.zeros(1, dtype=torch.int64, device=device)
    where_kernel[(1,)](output, batch, row, rows, width)
    assert output.item() == (batch * rows + row) * width
