"""On a GPU: the shapes of SD1.5, SDXL and their VAEs, CUDA graphs, torch.compile, and a tensor past 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo.actions.tf32 import fp32_precision
from diffusers_turbo.kernels import KERNELS
from diffusers_turbo.kernels.group_norm import group_norm, group_norm_launch, group_norm_plain
from tests.kernels.checking import DTYPES, check, image, largest_error, randn

pytestmark = pytest.mark.gpu

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# channels, side: SD1.5 at 512, SDXL at 1024, and the VAE's decoder
UNET = [(320, 64), (640, 64), (960, 64), (320, 32), (640, 32), (960, 32), (1920, 32), (640, 16), (1280, 16), (1920, 16)]
UNET += [(2560, 16), (1280, 8), (2560, 8), (320, 128), (640, 128), (960, 128), (1280, 64), (1920, 64), (2560, 32)]
VAE = [(512, 64), (512, 128), (512, 256), (256, 256), (256, 512), (128, 512), (128, 1024)]


# batch, channels, side before: SD1.5 at 512 and SDXL at 1024 with guidance, and the VAE's decoder
UPSAMPLED = [(2, 1280, 16), (2, 640, 32), (2, 1280, 32), (2, 640, 64), (1, 512, 64), (1, 512, 128), (1, 256, 256)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
    torch.cuda.empty_cache()


@every_dtype
@pytest.mark.parametrize(("channels", "side"), UNET, ids=str)
def test_group_norm_of_a_unet(channels, side, dtype):
    x = image(2, channels, side, side, dtype=dtype, device="cuda")
    weight, bias, add = (
        randn(*shape, dtype=dtype, device="cuda") for shape in ((channels,), (channels,), (2, channels))
    )
    check("group_norm", x, 32, weight, bias, silu=True, add=add)
    check("group_norm", x, 32, weight, bias, 1e-6, before=add[0])
    check("bias_residual", x, x.flip(0), bias)


@every_dtype
@pytest.mark.parametrize(("channels", "side"), VAE, ids=str)
def test_group_norm_of_a_vae(channels, side, dtype):
    x = image(1, channels, side, side, dtype=dtype, device="cuda")
    check("group_norm", x, 32, *randn(2, channels, dtype=dtype, device="cuda"), 1e-6, silu=True)


@every_dtype
@pytest.mark.parametrize(("length", "width"), [(4096, 320), (1024, 640), (256, 1280), (64, 1280), (4096, 640)], ids=str)
def test_transformer_blocks(length, width, dtype):
    check("geglu", randn(2, length, 8 * width, dtype=dtype, device="cuda"))
    x, residual = randn(2, 2, length, width, dtype=dtype, device="cuda")
    check("add_layer_norm", x, residual, *randn(2, width, dtype=dtype, device="cuda", seed=1))


@pytest.mark.skipif(not KERNELS["linear_geglu"].places(), reason="not a GPU that linear_geglu is for")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "depth"), [(8192, 320), (2048, 640), (512, 1280), (128, 1280), (8192, 640), (2048, 1280), (77, 1280)]
)
def test_projection_and_geglu(rows, depth, dtype):
    x = randn(rows, depth, dtype=dtype, device="cuda")
    weight = randn(8 * depth, depth, dtype=dtype, device="cuda", seed=1) * depth**-0.5
    check("linear_geglu", x, weight, randn(8 * depth, dtype=dtype, device="cuda", seed=2))


@every_dtype
@pytest.mark.parametrize(("batch", "channels", "side"), UPSAMPLED, ids=str)
def test_upsampling_and_convolution(batch, channels, side, dtype):
    like = {"dtype": dtype, "device": "cuda"}
    x, bias = image(batch, channels, side, side, **like), randn(channels, **like)
    weight = (randn(channels, 3, 3, channels, seed=7) * (9 * channels) ** -0.5).to(**like).movedim(-1, 1)
    with fp32_precision("ieee"):  # cuDNN convolves in TF32 otherwise
        check("upsample_conv", x, weight, bias, compare=dtype == torch.float32)


def test_group_norm_past_2_31_elements():
    """4104 x 4096 positions of 128 channels; compared group by group, since the whole in fp64 fits no card."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    x = torch.empty(1, 4104, 4096, 128, dtype=torch.float16, device="cuda").normal_().movedim(-1, 1)
    assert x.numel() > 2**31
    x[..., -8:, :] += 3
    bias = randn(128, dtype=torch.float16, device="cuda")
    rule = group_norm_launch(128, 4104 * 4096, 32)
    assert rule.split
    output = group_norm(x, 32, None, bias)
    assert output.stride() == x.stride()
    for group in (0, 15, 31):
        channels = slice(4 * group, 4 * group + 4)
        part = x[:, channels].float()
        centred = part - part.mean(dtype=torch.float64).float()
        truth = centred / centred.square().mean(dtype=torch.float64).add(1e-5).sqrt().float()
        truth += bias[channels].float()[:, None, None]
        assert largest_error(output[:, channels, -64:], truth[:, :, -64:].double()) < 6e-4
        assert largest_error(output[:, channels, :64], truth[:, :, :64].double()) < 6e-4


def test_geglu_past_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    rows = 2**31 // 2560 + 8
    x = torch.empty(rows, 2560, dtype=torch.float16, device="cuda").normal_()
    output = KERNELS["geglu"].run(x)
    assert largest_error(output[-8:], KERNELS["geglu"].plain(x[-8:].double())) < 6e-4


def test_interleaving_past_2_31_elements():
    """4112 x 4096 positions of 128 channels, whole numbers: the first and the last are where they belong."""
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free GPU memory")
    height, width, channels = 2056, 2048, 128
    y = torch.empty(1, height + 1, width + 1, 4 * channels, dtype=torch.float16, device="cuda").random_(-99, 99)
    bias = torch.arange(channels, device="cuda").half()
    output = torch.ops.diffusers_turbo.upsample_conv_interleave(y.movedim(-1, 1), bias, [])
    assert output.numel() > 2**31
    for first in (0, height - 4):
        lines = output.movedim(1, -1)[0, 2 * first : 2 * first + 8]
        for down in (0, 1):
            for across in (0, 1):
                start = (2 * down + across) * channels
                part = y[0, first + down : first + down + 4, across : across + width, start : start + channels]
                assert torch.equal(lines[down::2, across::2], part + bias)


def arguments_of(name: str) -> tuple:
    like = {"dtype": torch.float16, "device": "cuda"}
    if name == "group_norm":
        return image(2, 320, 64, 64, **like), 32, *randn(2, 320, **like)
    if name == "geglu":
        return (randn(2, 64, 2560, **like),)
    if name == "linear_geglu":
        if not KERNELS[name].places():
            pytest.skip("not a GPU that linear_geglu is for")
        return randn(2, 64, 320, **like), randn(2560, 320, **like), randn(2560, **like)
    if name == "bias_residual":
        return *(image(2, 320, 64, 64, **like) for _ in range(2)), randn(320, **like)
    if name == "upsample_conv":
        return image(2, 320, 32, 32, **like), image(320, 320, 3, 3, **like) * 0.01, randn(320, **like)
    return *randn(2, 2, 64, 320, **like), *randn(2, 320, **like)


@pytest.mark.parametrize("name", KERNELS)
def test_recorded_in_a_cuda_graph(name):
    run, arguments = KERNELS[name].run, arguments_of(name)
    run(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(*arguments)
    arguments[0].mul_(0.5)
    graph.replay()
    torch.testing.assert_close(recorded, run(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_within_a_compiled_function(name):
    run, arguments = KERNELS[name].run, arguments_of(name)
    compiled = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), run(*arguments), rtol=0, atol=0)


def test_group_norm_repeats_to_the_bit():
    x = image(1, 128, 512, 512, dtype=torch.float16, device="cuda")
    first = group_norm(x, 32, silu=True)
    assert all(torch.equal(group_norm(x, 32, silu=True), first) for _ in range(5))
    assert largest_error(first, group_norm_plain(x.double(), 32, silu=True)) < 6e-4
