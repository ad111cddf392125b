"""Compilation in place: class, keys, saving and LoRA keep working, offload goes in any order, the picture stays."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffusers_turbo import TurboError, turbo
from diffusers_turbo.actions.compiling import apply
from diffusers_turbo.facts.components import read_component
from diffusers_turbo.graphs.capture import CAPTURES
from diffusers_turbo.parity import distance
from diffusers_turbo.planning.options import CompileUNet
from tests import dynamo, tiny
from tests.compilation import micro
from tests.graphs.fake import FakeCapture
from tests.state import differences, state_of


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Compiled code of one test must not be another's."""
    dynamo.reset()
    yield
    dynamo.reset()


def test_compiled_picture_is_exact_and_undo_gives_the_same_bits(tmp_path):
    pipe = micro.sd()
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


@pytest.mark.parametrize("order", ["compile first", "offload first"])
def test_compile_and_model_offload_in_any_order(order):
    pipe = micro.sd()
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


@pytest.fixture
def broken():
    """A backend that fails as Inductor does without a C++ compiler; gives its name and what it was asked to compile."""
    asked: list[Any] = []

    def broken_backend(graph: Any, inputs: Any) -> Any:
        asked.append(graph)
        raise RuntimeError("No working C++ compiler found")

    torch._dynamo.register_backend(broken_backend, name="broken")
    yield asked
    torch._dynamo.backends.registry._COMPILER_FNS.pop("broken")
    torch._dynamo.backends.registry._BACKENDS.pop("broken", None)


def test_a_failing_compiler_costs_no_picture_and_is_told(broken, caplog):
    pipe = micro.sd()
    stock, before = tiny.picture(pipe), state_of(pipe)
    pipe.compile_unet(backend="broken")
    assert torch.equal(tiny.picture(pipe), stock)
    assert torch.equal(tiny.picture(pipe), stock)
    assert len(broken) == 1
    assert "UNet2DConditionModel runs eagerly from now on" in caplog.text
    told = str(pipe.turbo_report())
    assert "1 of 1 run eagerly, since compiling failed: UNet2DConditionModel: " in told
    assert "No working C++ compiler found" in told
    assert not read_component("unet", "", pipe.unet).compiled
    twin = copy.deepcopy(pipe)
    pipe.uncompile()
    assert differences(before, state_of(pipe)) == []
    assert torch.equal(tiny.picture(twin), stock)
    twin.turbo_undo()
    assert twin.unet._compiled_call_impl is None


def test_graphs_go_on_over_the_eager_module_when_the_compiler_fails(broken, monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", FakeCapture)
    pipe = micro.sd()
    stock, before = tiny.picture(pipe, steps=3), state_of(pipe)
    pipe.compile_unet(backend="broken")
    pipe.enable_cuda_graphs()
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
    assert torch.equal(tiny.picture(pipe, steps=3), stock)
    graphs = pipe.unet._compiled_call_impl
    assert graphs.captured == 1
    assert graphs.replayed > 2
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_fullgraph_wants_to_know(broken):
    pipe = micro.sd()
    pipe.compile_unet(backend="broken", fullgraph=True)
    for _ in range(2):
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="No working C"):
            tiny.picture(pipe)
    assert len(broken) == 2


def test_a_card_too_old_for_triton_is_refused(monkeypatch):
    class OnACard(nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([SimpleNamespace(device=torch.device("cuda"))])

    pipe = SimpleNamespace(unet=OnACard(), components={})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    refusal = r"compile_unet\(\): found a card of SM 6.1; needed: SM 7.0 or newer for Triton.*enable_sdpa\(\)"
    with pytest.raises(TurboError, match=refusal):
        apply(pipe, CompileUNet())
    assert pipe.unet._compiled_call_impl is None
    # what needs no Triton is not refused, nor is a newer card
    apply(pipe, CompileUNet(backend="eager")).revert()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    apply(pipe, CompileUNet()).revert()
    assert pipe.unet._compiled_call_impl is None


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
