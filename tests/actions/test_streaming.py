"""The window's two streams: who waits for whom, on streams that only take down what is asked of them."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from diffusers_turbo.actions.streaming import Group, Unit, Window, extent, placed


class Streams:
    """Stands in for `torch.cuda`: a log of (what, stream, event)."""

    def __init__(self):
        self.log: list[tuple[str, str, object]] = []
        self.current = "main"
        streams = self

        class Event:
            def record(self, stream):
                streams.log.append(("record", stream.name, self))

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_event(self, event):
                streams.log.append(("wait", self.name, event))

            def wait_stream(self, stream):
                streams.log.append(("wait", self.name, stream.name))

        self.Event, self.Stream = Event, Stream

    def synchronize(self, device):
        self.log.append(("synchronize", "all", None))

    def current_stream(self, device):
        return self.Stream(self.current)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before


def _window(count=3):
    units = [Unit(layer, tuple(layer.parameters())) for layer in (nn.Linear(4, 4) for _ in range(count))]
    groups = [Group((unit,)) for unit in units]
    window = Window(torch.device("cpu"), [groups[0].size] * 2)
    streams = Streams()
    window.streams, window.stream = streams, streams.Stream("side")
    return window, streams, groups


def test_a_copy_waits_for_the_work_before_it_and_work_waits_for_its_copy():
    window, streams, (a, b, c) = _window()
    window.enter(a)
    window.fetch(b)
    streams.log.clear()
    window.enter(b)
    window.fetch(c)
    (let_go, worked), (needs, copied_b), (waits, behind), (done, copied_c) = [
        (f"{what} {stream}", event) for what, stream, event in streams.log
    ]
    assert (let_go, needs, waits, done) == ("record main", "wait main", "wait side", "record side")
    assert behind is worked, "the copy into a's buffer did not wait for a's work"
    assert copied_b is not copied_c
    streams.log.clear()
    window.enter(c)
    assert [event for what, stream, event in streams.log if (what, stream) == ("wait", "main")] == [copied_c]


def test_the_room_is_given_back_after_the_last_copy():
    window, streams, (a, b, _) = _window()
    home = a.tensors[0].data
    window.enter(a)
    assert a.tensors[0].data_ptr() != home.data_ptr()
    window.fetch(b)
    streams.log.clear()
    window.close()
    assert a.tensors[0].data_ptr() == home.data_ptr()
    assert [(what, stream) for what, stream, _ in streams.log][-1] == ("synchronize", "all")


def test_strides_and_offsets_survive_a_buffer():
    """Channels-last weights, slices of larger ones, scalars, and weights without values."""
    whole = torch.arange(96.0).reshape(2, 3, 4, 4)
    for tensor in (
        whole.to(memory_format=torch.channels_last),
        whole[:, 1:, ::2],
        torch.tensor(3.0),
        torch.empty(0, 4),
    ):
        buffer = torch.empty(512 + extent(tensor), dtype=torch.uint8)
        view = placed(buffer, 512, tensor)
        view.copy_(tensor)
        assert torch.equal(view, tensor)
        assert view.stride() == tensor.stride()
