"""What the user changed while a lever was on is left alone, and the report says so."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor2_0
from peft import LoraConfig

from diffusers_turbo import TurboError, turbo
from tests import tiny
from tests.state import differences, state_of


class CustomProcessor(AttnProcessor):
    """Somebody's own processor: a subclass of a known one."""


def test_a_processor_set_meanwhile_stays():
    pipe = turbo(tiny.sd())
    pipe.enable_naive_attention()
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.set_processor(mine := CustomProcessor())
    report = pipe.turbo_undo()
    assert attn.processor is mine
    assert any("Attention.processor was set to" in sentence for sentence in report.left_alone)
    others = [p for p in pipe.unet.attn_processors.values() if p is not mine]
    assert {type(p).__name__ for p in others} == {"AttnProcessor2_0"}


def test_unknown_processors_are_never_overwritten_and_the_report_says_which():
    pipe = turbo(tiny.sd())
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.set_processor(mine := CustomProcessor())
    adapter = IPAdapterAttnProcessor2_0(hidden_size=32, cross_attention_dim=tiny.CONTEXT)
    pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.set_processor(adapter)
    before = state_of(pipe)
    for enable in (pipe.enable_sdpa, pipe.enable_naive_attention, pipe.enable_attention_slicing):
        enable()
        assert attn.processor is mine
        text = str(pipe.turbo_report())
        assert "left alone in unet: CustomProcessor" in text
        assert "mid_block.attentions.0.transformer_blocks.0.attn2" in text
        assert "left alone in unet: IPAdapterAttnProcessor2_0" in text
    assert pipe.turbo_undo().left_alone == ()
    assert differences(before, state_of(pipe)) == []


def test_only_unknown_processors_means_refused():
    pipe = turbo(tiny.sd())
    pipe.unet.set_attn_processor(CustomProcessor())
    with pytest.raises(TurboError, match=r"enable_sdpa\(\): found 8 layers of unet: CustomProcessor"):
        pipe.enable_sdpa()


def test_a_lora_loaded_meanwhile_stays():
    pipe = turbo(tiny.sd())
    pipe.enable_sdpa()
    pipe.enable_channels_last()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with_lora = tiny.picture(pipe)
    assert pipe.turbo_undo().left_alone == ()
    assert any("lora" in name for name, _ in pipe.unet.named_parameters())
    torch.testing.assert_close(tiny.picture(pipe), with_lora, atol=1e-5, rtol=0)


def test_a_lora_loaded_under_half_precision_stays_and_is_reported():
    pipe = turbo(tiny.sd())
    weight = pipe.unet.conv_in.weight.detach().clone()
    pipe.enable_half_precision("bfloat16")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.unet.to(torch.bfloat16)
    report = pipe.turbo_undo()
    assert torch.equal(pipe.unet.conv_in.weight, weight)
    assert any("tensors added meanwhile stay in bfloat16" in sentence for sentence in report.left_alone)


def test_a_fused_lora_is_neither_bypassed_nor_lost_under_fused_projections():
    pipe = turbo(tiny.sd())
    pipe.fuse_qkv_projections()
    attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attn.to_q.weight.data += 0.5
    fused = tiny.picture(pipe)
    pipe.unfuse_qkv_projections()
    torch.testing.assert_close(fused, tiny.picture(pipe), atol=1e-5, rtol=0)


def test_weights_changed_under_half_precision_stay():
    pipe = turbo(tiny.sd())
    pipe.enable_half_precision("bfloat16")
    with torch.no_grad():
        pipe.unet.conv_in.weight.add_(1)
    changed = pipe.unet.conv_in.weight.detach().clone()
    report = pipe.turbo_undo()
    assert torch.equal(pipe.unet.conv_in.weight, changed)
    assert any("unet.conv_in.weight was changed while in bfloat16" in sentence for sentence in report.left_alone)
    assert pipe.vae.dtype == torch.float32


def test_a_dtype_set_by_the_user_stays():
    pipe = turbo(tiny.sd())
    pipe.enable_half_precision("bfloat16")
    pipe.vae.to(torch.float64)
    report = pipe.turbo_undo()
    assert pipe.vae.dtype == torch.float64
    assert pipe.unet.dtype == torch.float32
    assert any("vae." in sentence and "replaced meanwhile" in sentence for sentence in report.left_alone)


def test_a_unet_put_in_meanwhile_stays_and_the_old_one_is_restored():
    pipe = turbo(tiny.sd())
    old, new = pipe.unet, tiny.unet()
    pipe.enable_naive_attention()
    pipe.enable_channels_last()
    pipe.unet = new
    before = {name: parameter.stride() for name, parameter in new.named_parameters()}
    pipe.turbo_undo()
    assert pipe.unet is new
    assert {name: parameter.stride() for name, parameter in new.named_parameters()} == before
    assert {type(p).__name__ for p in old.attn_processors.values()} == {"AttnProcessor2_0"}
    assert old.conv_in.weight.is_contiguous()


def test_a_module_compiled_anew_meanwhile_stays_compiled():
    pipe = turbo(tiny.sd())
    pipe.compile_unet(backend="eager")
    pipe.unet.compile(backend="aot_eager")
    theirs = pipe.unet._compiled_call_impl
    report = pipe.turbo_undo()
    assert pipe.unet._compiled_call_impl is theirs
    assert any("was compiled anew meanwhile" in sentence for sentence in report.left_alone)


def test_vae_flags_set_meanwhile_stay():
    pipe = turbo(tiny.sd())
    pipe.enable_vae_tiling(tile_size=32)
    pipe.vae.tile_sample_min_size = 48
    report = pipe.turbo_undo()
    assert pipe.vae.tile_sample_min_size == 48
    assert pipe.vae.use_tiling is False
    assert any("tile_sample_min_size was set to 48 meanwhile" in sentence for sentence in report.left_alone)


def test_disabling_keeps_what_was_left_alone_for_the_report():
    pipe = turbo(tiny.sd())
    pipe.enable_vae_tiling(tile_size=32)
    pipe.vae.tile_overlap_factor = 0.5
    pipe.disable_vae_tiling()
    assert any("tile_overlap_factor" in sentence for sentence in pipe.turbo_report().left_alone)
    pipe.turbo_undo()
    assert pipe.turbo_report().left_alone == ()
