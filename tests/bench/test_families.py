"""A step's kernels by family: names that libraries really give, and gaps told from waits."""

from __future__ import annotations

import pytest

from diffusers_turbo.bench.families import Kernel, describe, family_of

# as traces of Stable Diffusion on an H100 have them
NAMES = {
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1": "attention",
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>": "attention",
    "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize256x64x32": "convolutions",
    "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>": "convolutions",
    "nvjet_sm90_hsh_168x128_64x5_1x2_h_bz_coopA_bias_TNN": "matrix products",
    "void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_128x64>": "matrix products",
    "triton_per_fused_add_clone_convolution_div_native_group_norm_silu_36": "Triton's kernels",
    "_geglu_kernel": "Triton's kernels",
    "single_kernel": "Triton's kernels",
    "Memcpy DtoD (Device -> Device)": "copies and fills",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<int>": "copies and fills",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float>": "PyTorch's other kernels",
    "something_nobody_knows": "other kernels",
}


@pytest.mark.parametrize(("name", "family"), NAMES.items())
def test_a_kernel_is_known_by_its_name(name, family):
    assert family_of(name) == family


def test_families_and_gaps_add_up_to_the_step():
    kernels = [
        Kernel("sm90_xmma_fprop", 0, 1000),
        Kernel("nvjet_sm90", 1002, 1502),
        Kernel("nvjet_sm90", 1400, 1500),  # beside it, on another stream
        Kernel("sm90_xmma_fprop", 1552, 2552),  # 50 us after: the host was waited for
    ]
    lines = [line.rsplit("  in ") for line in describe(kernels[::-1]).splitlines()]
    assert [(text.split("  ")[0], text.split()[-2], int(count)) for text, count in lines] == [
        ("convolutions", "2.000", 2),
        ("matrix products", "0.600", 2),
        ("gaps between kernels", "0.002", 1),
        ("gaps of 20 us and more", "0.050", 1),
    ]


def test_nothing_is_said_of_no_kernels():
    assert describe([]) == ""
