"""Compilation in place: class, keys, saving and LoRA keep working, offload goes in any order, the picture stays."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.parity import distance
from tests import tiny
from tests.state import differences, state_of


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Compiled code of one test must not be another's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_picture_is_exact_and_undo_gives_the_same_bits(tmp_path):
    pipe = turbo(tiny.sd())
    pipe.unet.save_pretrained(tmp_path / "stock")  # writes two entries into the config
    stock, before = tiny.picture(pipe), state_of(pipe)
    keys = list(pipe.unet.state_dict())
    pipe.compile_unet(backend="aot_eager")
    # aot_eager cannot run the autoencoder on a CPU: its group norm meets strides that were not predicted
    pipe.compile_vae(backend="eager")
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90
    assert type(pipe.unet) is UNet2DConditionModel
    assert list(pipe.unet.state_dict()) == keys
    pipe.unet.save_pretrained(tmp_path)
    assert UNet2DConditionModel.from_pretrained(tmp_path).config.sample_size == 8
    pipe.uncompile()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(pipe), stock)


def test_the_vaes_halves_are_compiled_since_its_forward_is_never_called():
    pipe = turbo(tiny.sd())
    pipe.compile_vae(backend="aot_eager")
    assert pipe.vae._compiled_call_impl is None
    assert pipe.vae.decoder._compiled_call_impl is not None
    assert pipe.vae.encoder._compiled_call_impl is not None


def test_regional_compiles_each_repeated_block():
    pipe = turbo(tiny.sd())
    pipe.compile_unet(backend="aot_eager", regional=True)
    compiled = [type(m).__name__ for m in pipe.unet.modules() if vars(m).get("_compiled_call_impl") is not None]
    assert set(compiled) == {"BasicTransformerBlock"}
    assert len(compiled) == sum(type(m).__name__ == "BasicTransformerBlock" for m in pipe.unet.modules())


def test_transformers_compile_too():
    pipe = turbo(tiny.pixart())
    stock = tiny.picture(pipe)
    pipe.compile_transformer(backend="aot_eager")
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90


def test_a_lora_loaded_after_compiling_changes_the_picture_rightly():
    pipe, plain = turbo(tiny.sd()), turbo(tiny.sd())
    pipe.compile_unet(backend="aot_eager")
    stock = tiny.picture(pipe)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    torch.manual_seed(1)
    plain.unet.add_adapter(config)
    ours = tiny.picture(pipe)
    assert distance(ours, tiny.picture(plain)).psnr_db >= 90
    pipe.unet.disable_adapters()
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90
    pipe.unet.delete_adapters("default")


@pytest.mark.parametrize("order", ["compile first", "offload first"])
def test_compile_and_model_offload_in_any_order(order):
    pipe = turbo(tiny.sd())
    stock, before = tiny.picture(pipe), state_of(pipe)
    switches = [lambda: pipe.compile_unet(backend="aot_eager"), lambda: pipe.enable_model_cpu_offload(device="cpu")]
    for switch in switches if order == "compile first" else reversed(switches):
        switch()
    assert distance(tiny.picture(pipe), stock).psnr_db >= 90
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_compiled_already_by_others_is_refused():
    pipe = turbo(tiny.sd())
    pipe.unet.compile(backend="eager")
    with pytest.raises(TurboError, match=r"compile_unet\(\): found UNet2DConditionModel compiled already"):
        pipe.compile_unet(backend="eager")


def test_a_model_without_repeated_blocks_refuses_regional():
    pipe = turbo(tiny.sd())
    with pytest.raises(TurboError, match=r"a AutoencoderKL that names no repeated blocks"):
        pipe.compile_vae(regional=True, backend="eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inductor_on_one_block():
    """The real compiler, on the smallest thing that shows it works with this package's attention."""
    pipe = turbo(tiny.sd())
    pipe.enable_sdpa()
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    states, context = torch.randn(2, 16, 64), torch.randn(2, 5, tiny.CONTEXT)
    with torch.no_grad():
        eager = block(states, encoder_hidden_states=context)
        block.compile(backend="inductor")
        torch.testing.assert_close(block(states, encoder_hidden_states=context), eager, atol=1e-5, rtol=1e-4)
