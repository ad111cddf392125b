"""What a graph reads its inputs from: filled when a tensor is new or has changed, and only then."""

from __future__ import annotations

import pytest
import torch

from diffusers_turbo.graphs import call as graph_call
from diffusers_turbo.graphs.call import GraphedCall
from diffusers_turbo.graphs.capture import CAPTURES
from diffusers_turbo.graphs.inputs import StaticInputs
from tests.graphs.fake import FakeCapture

CPU = torch.device("cpu")


def holds(inputs: StaticInputs, *values: torch.Tensor) -> bool:
    return all(torch.equal(held, value) for held, value in zip(inputs.static, values, strict=True))


def test_a_changed_or_another_tensor_is_copied():
    first, second = torch.randn(3), torch.randn(3)
    inputs = StaticInputs([first, second], CPU)
    inputs.captured()
    for _ in range(2):
        inputs.fill([first, second])
        assert holds(inputs, first, second)
    first.add_(1)
    inputs.fill([first, second])
    assert holds(inputs, first, second)
    other = torch.randn(3)
    inputs.fill([other, second])
    assert holds(inputs, other, second)
    inputs.fill([first, second])
    assert holds(inputs, first, second)


def test_the_same_tensor_is_not_copied_again():
    prompt, sample = torch.randn(3), torch.randn(3)
    inputs = StaticInputs([prompt, sample], CPU)
    inputs.captured()
    inputs.fill([prompt, sample])
    versions = [held._version for held in inputs.static]
    inputs.fill([prompt, torch.randn(3)])
    assert inputs.static[0]._version == versions[0]
    assert inputs.static[1]._version == versions[1] + 1


def test_a_tensor_born_where_another_died_is_copied():
    inputs = StaticInputs([torch.zeros(3)], CPU)
    inputs.captured()
    for value in range(20):
        source = torch.full((3,), float(value))
        inputs.fill([source])
        assert holds(inputs, source)
        del source


def test_what_the_captured_call_writes_into_is_copied_every_time():
    source = torch.zeros(3)
    inputs = StaticInputs([source], CPU)
    inputs.static[0].add_(1)  # the captured call
    inputs.captured()
    for _ in range(3):
        inputs.fill([source])
        assert holds(inputs, source)
        inputs.static[0].add_(1)  # its replay


def test_an_inference_tensor_is_copied_every_time():
    with torch.inference_mode():
        source = torch.zeros(3)
        inputs = StaticInputs([source], CPU)
        inputs.captured()
        inputs.fill([source])
        source.add_(1)
        inputs.fill([source])
        assert holds(inputs, source)


@pytest.mark.parametrize("expanded", [torch.zeros(1, 3).expand(2, 3), torch.zeros(2, 1).expand(2, 3)])
def test_expanded_tensors_keep_their_strides(expanded):
    inputs = StaticInputs([expanded], CPU)
    inputs.captured()
    inputs.fill([torch.ones(6).as_strided((2, 3), expanded.stride())])
    assert inputs.static[0].stride() == expanded.stride()
    assert inputs.static[0].eq(1).all()


def test_what_is_cached_goes_back_before_a_graph_lays_its_inputs_out(monkeypatch):
    """An input of its own would hold the segment that it lies in for as long as the graph is there."""
    happened = []
    monkeypatch.setattr(graph_call, "return_cached", lambda device: happened.append("returned"))

    def inputs(leaves, device):
        happened.append("inputs")
        return StaticInputs(leaves, device)

    def capture(run, device):
        happened.append("recorded")
        return FakeCapture(run, device)

    monkeypatch.setattr(graph_call, "StaticInputs", inputs)
    monkeypatch.setitem(CAPTURES, "cpu", capture)
    call = GraphedCall(module := torch.nn.Linear(2, 2), module._call_impl, max_graphs=1)
    with torch.no_grad():
        for _ in range(3):
            call(torch.ones(1, 2))
    assert happened == ["returned", "inputs", "recorded"]
