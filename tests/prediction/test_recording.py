"""What is recorded on the meta device is what really happens: counted on the CPU, the same networks, the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusers_turbo import turbo
from diffusers_turbo.actions.denoiser_slices import WorksInSlices
from diffusers_turbo.bench.live_bytes import LiveBytes
from diffusers_turbo.facts.device import DeviceFacts
from diffusers_turbo.prediction.attention import KernelMemory
from diffusers_turbo.prediction.recording import Convolved, Gone, Made, Marks, Multiplied, Recorder
from diffusers_turbo.prediction.repeating import SameAgain, SameInRow, shorten, shorten_pictures, shorten_slices
from diffusers_turbo.prediction.skeleton import on_meta, skeleton_of
from tests import tiny

H100 = DeviceFacts.card("H100")


def peak(events):
    """The most bytes alive at once."""
    live, most, sizes = 0, 0, {}
    for event in events:
        if isinstance(event, Made):
            sizes[event.key] = event.size
            live += event.size
            most = max(most, live)
        elif isinstance(event, Gone):
            live -= sizes.pop(event.key)
    return most


def _unet_call(unet, device, context):
    empty = torch.zeros if device == "cpu" else torch.empty
    sample = empty(2, 4, 16, 16, device=device)
    return unet(sample, empty((), device=device), empty(2, 16, context, device=device), return_dict=False)


def _decode(vae, device):
    empty = torch.zeros if device == "cpu" else torch.empty
    return vae.decode(empty(2, 4, 16, 16, device=device), return_dict=False)


def _on_cpu(call, module):
    """Live bytes of a real run. Its attention is naive: the fused kernel of a CPU keeps other things than a GPU's."""
    with torch.no_grad(), LiveBytes() as memory:
        call(module, "cpu")
    return memory.peak


def _recorded(call, module, *prepare):
    """Record a run on the meta device, after what is done to the copy that runs, which is given marks, too."""
    twin, marks = on_meta(module), Marks()
    for change in prepare:
        change(twin, marks)
    with torch.no_grad(), Recorder([twin]) as recorder, marks.to(recorder):
        call(twin, "meta")
    return recorder


def _on_meta(call, module, *prepare):
    return peak(_recorded(call, module, *prepare).events)


@pytest.mark.parametrize(
    "switches",
    [
        [("enable_naive_attention", {})],
        [("enable_attention_slicing", {"slice_size": "max"})],
        [("enable_naive_attention", {}), ("fuse_qkv_projections", {})],
    ],
    ids=["naive", "sliced", "fused projections"],
)
def test_live_storages_of_a_unet_are_those_of_a_real_run(switches):
    pipe = turbo(tiny.sd())
    for action, arguments in switches:
        getattr(pipe, action)(**arguments)
    run = lambda unet, device: _unet_call(unet, device, tiny.CONTEXT)  # noqa: E731
    assert _on_meta(run, pipe.unet) == _on_cpu(run, pipe.unet)


@pytest.mark.parametrize("shortened", [False, True], ids=["every slice", "slices like earlier ones repeated"])
@pytest.mark.parametrize("slice_size", [1, 2, 4])
def test_live_storages_of_a_batch_in_slices_are_those_of_a_real_run(slice_size, shortened):
    """Of six samples; four leave a smaller slice."""

    def run(unet, device):
        empty = torch.zeros if device == "cpu" else torch.empty
        sample, prompt = empty(6, 4, 16, 16, device=device), empty(6, 16, tiny.CONTEXT, device=device)
        return unet(sample, empty((), device=device), prompt, return_dict=False)

    pipe = turbo(tiny.sd())
    pipe.enable_naive_attention()
    whole = _on_cpu(run, pipe.unet)
    prepare = [shorten_slices] if shortened else []
    prepare.append(lambda unet, marks: WorksInSlices(unet, slice_size=slice_size).install())
    predicted = _on_meta(run, pipe.unet, *prepare)
    pipe.enable_denoiser_slicing(slice_size)
    real = _on_cpu(run, pipe.unet)
    # of a repeated slice only what waits for the others
    assert predicted == pytest.approx(real, rel=0.02 if shortened else 0)
    assert real < whole * (0.1 + slice_size / 6)


@pytest.mark.parametrize("slicing", [False, True])
def test_live_storages_of_a_decode_are_those_of_a_real_run(slicing):
    pipe = turbo(tiny.sd())
    pipe.enable_naive_attention()
    if slicing:
        pipe.enable_vae_slicing()
    assert _on_meta(_decode, pipe.vae) == _on_cpu(_decode, pipe.vae)


@pytest.mark.parametrize(
    ("switch", "given"),
    [
        ("enable_vae_tiling", {"tile_size": 64}),
        ("enable_vae_exact_tiling", {"tile_size": 64}),
        ("enable_vae_exact_tiling", {"tile_size": 32}),
    ],
)
@pytest.mark.parametrize("shortened", [False, True], ids=["every tile", "tiles like earlier ones repeated"])
def test_live_storages_of_a_decode_in_tiles_are_those_of_a_real_run(shortened, switch, given):
    pipe = turbo(tiny.sd())
    pipe.enable_naive_attention()
    getattr(pipe, switch)(**given)
    predicted = _on_meta(_decode, pipe.vae, *([shorten] if shortened else []))
    assert predicted == pytest.approx(_on_cpu(_decode, pipe.vae), rel=0.004 if shortened else 0.002)


def test_live_storages_of_a_batch_in_exact_tiles_are_those_of_a_real_run():
    """Picture after picture: the first runs, the second is repeated, of the others only what waits is made."""

    def run(vae, device):
        return vae.decode(torch.zeros(5, 4, 16, 16, device=device), return_dict=False)

    pipe = turbo(tiny.sd())
    pipe.enable_naive_attention()
    pipe.enable_vae_exact_tiling(tile_size=64)
    every = _recorded(run, pipe.vae)
    # at each stage of a prediction tiles that stay on are met again
    shortened = _recorded(run, pipe.vae, shorten_pictures, shorten_pictures)
    assert peak(shortened.events) == pytest.approx(_on_cpu(run, pipe.vae), rel=0.02)
    assert shortened.operators < every.operators / 4


def test_a_picture_in_exact_tiles_has_one_stand_in_however_often_it_is_met():
    pipe = turbo(tiny.sd())
    pipe.enable_vae_exact_tiling(tile_size=32)
    for _ in range(2):
        shorten_pictures(pipe.vae, Marks())
    assert not isinstance(vars(pipe.vae.tiled_decode)["_decode"].run, SameInRow)


def test_pictures_in_host_memory_are_not_on_the_device():
    pipe, peaks = turbo(tiny.sd()), {}
    for hold_on in ("device", "host"):
        pipe.enable_vae_exact_tiling(tile_size=32, hold_on=hold_on)
        peaks[hold_on] = [_on_meta(_decode, pipe.vae, *prepare) for prepare in ([], [shorten])]
    for found in peaks.values():
        assert found[1] == pytest.approx(found[0], rel=0.004)
    assert peaks["host"][0] < peaks["device"][0] / 2


@pytest.mark.parametrize("as_view", [False, True])
def test_a_call_like_an_earlier_one_makes_what_that_one_made(as_view):
    class Layer(nn.Module):
        def forward(self, x):
            whole = (x + 1) * 2
            return whole[:4] if as_view else whole

    layer, marks, found = Layer(), Marks(), []
    layer.forward = SameAgain(layer.forward, marks)
    for calls in (1, 3):
        with Recorder() as recorder, marks.to(recorder):
            results = [layer(torch.empty(8, 256, device="meta")) for _ in range(calls)]
            del results
        found.append([type(event).__name__ for event in recorder.events])
    assert found[1].count("Made") == 3 * found[0].count("Made")
    assert found[1].count("Gone") == found[1].count("Made")


def test_a_call_that_ended_early_ends_so_again():
    class Layer(nn.Module):
        def forward(self, x):
            _ = x + 1
            raise StopIteration

    layer, marks = Layer(), Marks()
    layer.forward = SameAgain(layer.forward, marks)
    x = torch.empty(8, 256, device="meta")
    with Recorder() as recorder, marks.to(recorder):
        for _ in range(2):
            with pytest.raises(StopIteration):
                layer(x)
    assert [type(event) for event in recorder.events] == [Made, Gone, Made, Gone]
    assert recorder.operators == 1


def test_a_text_encoder_runs_without_values():
    encoder = on_meta(tiny.text_encoder())
    ids = torch.empty(1, tiny.TOKENS, dtype=torch.int64, device="meta")
    with torch.no_grad(), Recorder([encoder]) as recorder:
        states = encoder(input_ids=ids, output_hidden_states=True).last_hidden_state
    assert states.shape == (1, tiny.TOKENS, tiny.CONTEXT)
    assert any(isinstance(event, Multiplied) for event in recorder.events)


def test_weights_are_not_counted_and_views_make_nothing():
    layer = nn.Linear(4, 4, device="meta")
    with torch.no_grad(), Recorder([layer]) as recorder:
        _ = layer.weight.t().reshape(2, 8)[:, 1:]
    assert [event.size for event in recorder.events if isinstance(event, Made)] == [64]  # the reshape copies


def test_a_storage_is_gone_with_its_last_tensor():
    with Recorder() as recorder:
        x = torch.empty(256, device="meta")
        view = x[10:]
        del x
        assert not any(isinstance(event, Gone) for event in recorder.events)
        del view
        assert isinstance(recorder.events[-1], Gone)
    assert recorder.close() == ()


def test_convolutions_say_how_they_are_laid_out():
    layer = nn.Conv2d(4, 8, 3, padding=1, device="meta").to(memory_format=torch.channels_last)
    image = torch.empty(2, 4, 8, 8, device="meta")
    with torch.no_grad(), Recorder([layer]) as recorder:
        result = layer(image)
    (call,) = [event for event in recorder.events if isinstance(event, Convolved)]
    assert (call.channels_last, call.copies_input) == (True, True)
    assert (call.input, call.output, call.weight) == (image.nbytes, result.nbytes, layer.weight.nbytes)
    assert result.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Recorder([layer]) as recorder:
        layer(result[:, :4].contiguous(memory_format=torch.channels_last))
    assert not next(event for event in recorder.events if isinstance(event, Convolved)).copies_input


@pytest.mark.parametrize(("batch", "last"), [(1, False), (2, True)])
def test_a_picture_in_channels_last_decides_unless_it_is_alone(batch, last):
    layer = nn.Conv2d(4, 8, 3, padding=1, device="meta")
    # a VAE's attention: tokens [B, H * W, C] seen as a picture
    image = torch.empty(batch, 64, 4, device="meta").transpose(1, 2).reshape(batch, 4, 8, 8)
    with torch.no_grad(), Recorder([layer]) as recorder:
        result = layer(image)
    (call,) = [event for event in recorder.events if isinstance(event, Convolved)]
    assert call.channels_last == last
    assert result.is_contiguous(memory_format=torch.channels_last) == last


def test_a_softmax_of_plain_attention_holds_a_mask_beside_its_scores():
    query = torch.empty(1, 2, 64, 8, device="meta")
    with Recorder() as recorder:
        torch.ops.aten._scaled_dot_product_attention_math(query, query, query)
    sizes = [event.size for event in recorder.events if isinstance(event, Made)]
    scores = 2 * 64 * 64
    assert sizes.count(4 * scores) == 2
    assert sizes.count(scores) == 1


def test_the_quick_operators_make_what_the_slow_ones_make():
    """`_QUICK` knows shapes by heart; the CPU's operators have the last word on shape, dtype and layout."""

    def run(device, dtype):
        x = torch.zeros(2, 6, 8, device=device, dtype=dtype)
        weight = torch.zeros(8, 4, device=device, dtype=dtype)
        turned = torch.zeros(2, 8, 6, device=device, dtype=dtype).transpose(1, 2)
        flat = x.flatten(0, 1)
        return (
            x + x,
            x * turned,
            x + 1,
            x * x[:1],
            F.silu(turned),
            F.gelu(x[..., :4]),
            F.layer_norm(x, (8,)),
            F.group_norm(x, 3),
            flat @ weight,
            torch.bmm(x, weight.expand(2, 8, 4)),
            torch.addmm(weight[0], flat, weight),
            x + x.float(),
        )

    for dtype in (torch.float32, torch.float16):
        with torch.no_grad(), Recorder():
            fast = run("meta", dtype)
        for one, other in zip(fast, run("cpu", dtype), strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_a_norm_makes_its_statistics_too():
    with torch.no_grad(), Recorder() as recorder:
        x = torch.empty(4, 6, 8, device="meta", dtype=torch.float16)
        F.layer_norm(x, (8,))
    statistics = 4 * 6 * 4  # in fp32, as a GPU computes them
    made = [event.size for event in recorder.events if isinstance(event, Made)]
    assert made == [x.nbytes, x.nbytes, statistics, statistics]
    with torch.no_grad(), Recorder() as recorder:
        F.group_norm(x, 3)
    statistics = 4 * 3 * 2  # in the picture's own dtype
    made = [event.size for event in recorder.events if isinstance(event, Made)]
    assert made == [x.nbytes, statistics, statistics]


@pytest.mark.parametrize(
    ("card", "dtype", "head_dim", "sides"),
    [
        ("H100", torch.float16, 64, 2 * 4 * 64 * 4),  # flash, cuDNN: log-sum-exp in fp32
        ("H100", torch.float16, 512, 2 * 64 * 4 * 512 * 4),  # efficient, too wide for registers: an fp32 output
        ("H100", torch.float32, 64, 0),  # efficient
        ("T4", torch.float16, 64, 0),
    ],
)
def test_fused_attention_makes_what_its_kernel_makes(card, dtype, head_dim, sides):
    query = torch.empty(2, 4, 64, head_dim, device="meta", dtype=dtype)
    with KernelMemory(DeviceFacts.card(card)), Recorder() as recorder:
        output = F.scaled_dot_product_attention(query, query, query)
        laid_out = output.transpose(1, 2).flatten(2)
    assert output.shape == query.shape
    made = [event.size for event in recorder.events if isinstance(event, Made)]
    assert made == [output.nbytes, *([sides] if sides else [])]
    assert laid_out.is_contiguous()


def test_attention_without_a_kernel_holds_the_scores():
    query = torch.empty(1, 2, 256, 64, device="meta", dtype=torch.float64)  # no fused kernel takes it
    with KernelMemory(H100), Recorder() as recorder:
        F.scaled_dot_product_attention(query, query, query)
    assert peak(recorder.events) >= 2 * (2 * 256 * 256 * 8)


def test_a_forward_like_an_earlier_one_is_repeated_not_run():
    ran = []
    marks = Marks()

    def forward(x):
        ran.append(x.shape)
        return (x + 1) * 2

    again = SameAgain(forward, marks)
    x, small = torch.empty(64, device="meta"), torch.empty(32, device="meta")
    with Recorder() as recorder, marks.to(recorder):
        results = [again(x), again(small), again(x)]
    assert ran == [(64,), (32,)]
    assert [result.shape for result in results] == [(64,), (32,), (64,)]
    assert [event.size for event in recorder.events if isinstance(event, Made)] == [256, 256, 128, 128, 256, 256]
    del results
    assert peak(recorder.events) == 256 + 128 + 2 * 256


def test_a_forward_whose_norms_run_another_one_is_run():
    norm, marks, ran = nn.GroupNorm(2, 4), Marks(), []
    again = SameAgain(lambda x: ran.append(x.shape) or x + 1, marks, (norm,))
    x = torch.empty(64, device="meta")

    def measure(input):
        return input

    with Recorder() as recorder, marks.to(recorder):
        for forward in (None, measure, measure):
            vars(norm).update({"forward": forward} if forward else {})
            again(x)
    assert len(ran) == 2


def test_a_skeleton_has_no_weights_and_leaves_the_pipeline_alone():
    pipe = turbo(tiny.sd())
    pipe.enable_channels_last()
    pipe.enable_vae_slicing()
    before = {name: value.data_ptr() for name, value in pipe.unet.named_parameters()}
    skeleton = skeleton_of(pipe)
    for name, module in skeleton.modules.items():
        real = dict(getattr(pipe, name).named_parameters())
        for key, hollow in module.named_parameters():
            assert hollow.is_meta
            assert (hollow.shape, hollow.stride(), hollow.dtype) == (
                real[key].shape,
                real[key].stride(),
                real[key].dtype,
            )
    assert skeleton.pipe.vae.use_slicing
    assert skeleton.pipe.unet is not pipe.unet
    assert {name: value.data_ptr() for name, value in pipe.unet.named_parameters()} == before
    skeleton.pipe.vae.use_slicing = False
    assert pipe.vae.use_slicing


class NeverCopied:
    """What a hook may hold: all of a model's weights."""

    def __call__(self, x):
        raise AssertionError("a forward that moves weights")

    def __deepcopy__(self, memo):
        raise AssertionError("copied")


@pytest.mark.parametrize("name", ["_hf_hook", "_diffusers_hook", "_old_forward", "forward"])
def test_hooks_and_forwards_that_may_hold_weights_are_left_behind(name):
    layer = nn.Linear(2, 2)
    vars(layer)[name] = NeverCopied()
    twin = on_meta(nn.Sequential(layer))
    assert name not in vars(twin[0])
    assert twin(torch.empty(1, 2, device="meta")).shape == (1, 2)
    assert isinstance(vars(layer)[name], NeverCopied)


def test_tied_weights_stay_tied():
    first = nn.Linear(4, 4)
    both = nn.Sequential(first, nn.Linear(4, 4))
    both[1].weight = first.weight
    twin = on_meta(both)
    assert twin[1].weight is twin[0].weight
    with torch.no_grad():
        both[1].bias.data = first.weight.data[0]
    assert on_meta(both)[1].bias.untyped_storage()._cdata != 0
    twin = on_meta(both)
    assert twin[1].bias.untyped_storage()._cdata == twin[0].weight.untyped_storage()._cdata
