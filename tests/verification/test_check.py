"""Verification: the same inputs on both sides, a verdict with its thresholds, nothing left on the pipeline."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image

from diffusers_turbo import turbo
from diffusers_turbo.errors import InvalidOptionError, NotSupportedError
from diffusers_turbo.verification.check import THRESHOLDS
from diffusers_turbo.verification.inputs import PROMPTS, make_inputs
from diffusers_turbo.verification.pictures import record_pictures, replay_pictures
from diffusers_turbo.verification.sheet import save_verification
from tests import tiny
from tests.exactness import wrong_variants
from tests.state import differences, state_of
from tests.test_exactness import load

TWO = ("a flat emoji of rocket", "a 3d emoji of octopus")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load(torch.float32, "cpu")


@pytest.fixture
def emoji(loaded) -> Any:
    """The emoji model, every lever off after the test."""
    yield loaded
    loaded.turbo_undo()


@pytest.mark.parametrize(
    ("switches", "verdict", "promise"),
    [
        ([], "exact", "exact"),
        ([("enable_sdpa", {}), ("enable_channels_last", {})], "exact", "exact"),
        ([("enable_half_precision", {"dtype": "bfloat16"})], "exact", "exact"),
        ([("enable_vae_tiling", {"tile_size": 64})], "close", "close"),
    ],
    ids=["stock", "exact levers", "bfloat16", "tiles"],
)
def test_sound_pipelines_keep_their_promise(emoji, switches, verdict, promise):
    for method, options in switches:
        getattr(emoji, method)(**options)
    emoji("a cat", num_inference_steps=1)  # what a call sets on the pipeline is there before
    before = state_of(emoji)
    found = emoji.turbo_verify(TWO, steps=3, batch_size=2)
    assert set(differences(before, state_of(emoji))) <= {"pipe: _num_timesteps: 1 -> 3"}
    assert (found.verdict.level, found.promise, found.kept) == (verdict, promise, True)
    assert (found.pairs, found.steps, found.reference) == (2, 3, "fp32, naive attention")
    assert (found.stock is None) == (found.dtype == "float32")
    assert THRESHOLDS in str(found)


@pytest.mark.parametrize("fault", ["mid block skipped", "another prompt in one layer", "every tenth step reused"])
def test_faults_of_the_pipeline_show_against_a_reference_of_its_own(emoji, fault):
    """A fault in the pipeline itself is in its copy as well, so the reference is another one."""
    steps = 10 if "tenth" in fault else 3
    sound = load(torch.float32, "cpu")
    with wrong_variants(emoji)[fault]():
        found = emoji.turbo_verify(TWO, steps=steps, batch_size=2, reference=sound)
    assert not found.kept
    assert found.verdict.reasons


@pytest.mark.parametrize(
    ("value", "reason"), [(float("nan"), "2 of 2 pictures hold NaN"), (-1e4, "pictures are black")]
)
def test_unusable_pictures_are_named(emoji, value, reason):
    handle = emoji.vae.decoder.register_forward_hook(lambda module, args, output: torch.full_like(output, value))
    try:
        found = emoji.turbo_verify(TWO, steps=1, batch_size=2, reference=load(torch.float32, "cpu"))
    finally:
        handle.remove()
    assert found.verdict.level == "different"
    assert any(reason in text for text in found.verdict.reasons)
    assert "DIFFERENT" in str(found)
    json.loads(found.to_json(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def test_half_precision_gets_the_reference_s_numbers():
    """A seed alone would not do: bfloat16 draws other numbers, and its text encoder gives other embeddings."""
    pipe, inputs = turbo(tiny.sd()), make_inputs("a cat", pairs=1, steps=1)
    _, tapes = record_pictures(pipe, inputs)
    seen: dict[str, torch.Tensor] = {}

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(sample=args[0], context=kwargs["encoder_hidden_states"])

    pipe.enable_half_precision("bfloat16")
    pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    replay_pictures(pipe, inputs, tapes)
    recorded = {call.name: call.result for call in tapes[0].calls}
    latents, (positive, negative) = recorded["prepare_latents"], recorded["encode_prompt"][:2]
    assert torch.equal(seen["sample"], torch.cat([latents] * 2).bfloat16())
    assert torch.equal(seen["context"], torch.cat([negative, positive]).bfloat16())


def test_schedulers_that_draw_noise(pipe):
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    turbo(pipe).enable_channels_last()
    assert pipe.turbo_verify("a cat", steps=2).kept  # in fp32 the noise is the same
    pipe.enable_half_precision("bfloat16")
    with pytest.raises(
        NotSupportedError, match=r"EulerAncestralDiscreteScheduler, which draws noise in every step.*DDIM"
    ):
        pipe.turbo_verify("a cat", steps=2)


def test_sdxl(xl_pipe):
    turbo(xl_pipe).enable_attention_slicing()
    found = xl_pipe.turbo_verify("a cat", steps=2)
    assert found.verdict.exact, str(found)
    assert found.ours.latents is not None


def test_an_offloaded_pipeline(pipe):
    stock, before = tiny.picture(turbo(pipe)), state_of(pipe)
    pipe.enable_group_offload(onload_device="cpu", offload_type="leaf_level")
    assert pipe.turbo_verify("a cat", steps=2).verdict.exact
    assert torch.equal(tiny.picture(pipe), stock)
    pipe.turbo_undo()
    assert differences(before, state_of(pipe)) == []


def test_where_the_naive_matrix_does_not_fit_the_reference_is_sliced(pipe, monkeypatch):
    from diffusers_turbo.attention import NaiveAttnProcessor

    def too_large(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(NaiveAttnProcessor, "__call__", too_large)
    assert turbo(pipe).turbo_verify("a cat", steps=1).reference == "fp32, sliced attention"


def test_hooks_of_others_are_refused_with_the_way_out(pipe):
    pipe.enable_group_offload("cpu", offload_type="leaf_level")
    with pytest.raises(NotSupportedError, match="offload hooks on .*unet.*pass a reference pipeline of your own"):
        turbo(pipe).turbo_verify("a cat", steps=1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pairs": 0}, "pairs = 0; needed: a positive number of pairs"),
        ({"steps": 0}, "steps = 0; needed: a positive integer for steps"),
        ({"batch_size": -1}, "batch_size = -1"),
        ({"prompts": [3]}, "prompts that are not text"),
    ],
)
def test_bad_input(pipe, arguments, text):
    with pytest.raises(InvalidOptionError, match=text):
        turbo(pipe).turbo_verify(**arguments)


def test_prompts_and_seeds():
    assert make_inputs().prompts == PROMPTS
    assert make_inputs().seeds == tuple(range(len(PROMPTS)))
    assert make_inputs("a cat", pairs=2).prompts == ("a cat", "a cat")
    assert [len(prompts) for prompts, _ in make_inputs(pairs=5, batch_size=2).batches()] == [2, 2, 1]


def test_sheet(emoji, tmp_path):
    found = emoji.turbo_verify(TWO, steps=1, batch_size=2)
    save_verification(found, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width >= 2 * 128
        assert sheet.height >= 3 * 128
        assert len(sheet.getcolors(2**24)) > 100
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOptionError, match=r"writing .*needed: a folder that can be written to"):
        save_verification(found, tmp_path / "file" / "sheet.png")
