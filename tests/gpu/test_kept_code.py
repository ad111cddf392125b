"""On a GPU: code that is kept on disk gives the picture of code that was just compiled, without a trace, also later."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import compilation_time_metrics

from diffusers_turbo import auto_optimize
from diffusers_turbo.parity import distance
from tests import dynamo, tiny
from tests.compilation import micro

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    dynamo.reset()
    yield
    dynamo.reset()


def optimized(folder):
    """A pipeline under the compiled tier, as in a process that has traced nothing yet."""
    dynamo.reset()
    compilation_time_metrics.clear()
    pipe = micro.sd().to("cuda", torch.float16)
    return auto_optimize(pipe, tier="compiled", cache_dir=str(folder))


def test_a_second_pipeline_draws_the_same_picture_without_a_trace(tmp_path):
    stock = tiny.picture(micro.sd().to("cuda", torch.float16))
    first = optimized(tmp_path / "kept")
    wanted = [tiny.picture(first) for _ in range(3)]
    assert "traced and compiled here, and kept" in str(first.turbo_report())
    assert min(distance(picture, stock).psnr_db for picture in wanted) >= 50
    second = optimized(tmp_path / "kept")
    assert all(torch.equal(tiny.picture(second), wanted[0]) for _ in range(3))
    report = str(second.turbo_report())
    assert report.count("neither traced nor compiled: found on disk") == 2, report
    assert "bytecode_tracing" not in compilation_time_metrics
    assert "could not be captured" not in report
    # the code holds no weights, of the network or of what is computed ahead
    with torch.no_grad():
        for module in second.unet.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(1.5)
    changed = tiny.picture(second)
    second.turbo_undo()
    assert distance(changed, tiny.picture(second)).psnr_db >= 50
    assert distance(changed, wanted[0]).psnr_db < 40


def test_a_lora_goes_the_compilers_way_and_back(tmp_path):
    pipe = optimized(tmp_path / "kept")
    before = tiny.picture(pipe)
    pipe.load_lora_weights(micro.lora(1, 4), adapter_name="it")
    ours = tiny.picture(pipe)
    eager = micro.sd().to("cuda", torch.float16)
    eager.load_lora_weights(micro.lora(1, 4), adapter_name="it")
    assert distance(ours, tiny.picture(eager)).psnr_db >= 40
    pipe.unload_lora_weights()
    assert distance(tiny.picture(pipe), before).psnr_db >= 60
