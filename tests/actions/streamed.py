"""A stand-in for the GPU of partial offload, which books what is moved to it."""

from __future__ import annotations

from torch import nn

from diffusers_turbo.actions import partial_offload
from diffusers_turbo.actions.ledger import ledger_of
from diffusers_turbo.actions.partial_offload import PartialResidency
from diffusers_turbo.actions.streaming import Loan, Window

EVERYTHING = 10**9
"""More than any tiny pipeline holds."""


def residency_of(pipe) -> PartialResidency:
    journal = ledger_of(pipe).top("offload").journal
    return next(change for change in journal.changes if isinstance(change, PartialResidency))


class Device:
    """Stands in for a GPU: the CPU, with a book of what was moved to it, kept where weights are moved."""

    def __init__(self, monkeypatch):
        self.held: dict[int, int] = {}
        self.windows: list[Window] = []
        self.peaks: dict[str, int] = {}
        self.moved = True  # since the last look
        device = self

        def bring(tensors, where):
            device.moved = True
            for tensor in tensors:
                tensor.data = tensor.data.clone()
                device.held.pop(id(tensor), None)
                if where != partial_offload.HOST:
                    device.held[id(tensor)] = tensor.data_ptr()

        class Booked(Loan):
            def _copied(self, home):
                return home.clone()

            def bring(self, tensors, *, faithful):
                device.moved = True
                super().bring(tensors, faithful=faithful)
                device.held |= {id(tensor): tensor.data_ptr() for tensor in self._away}

            def end(self):
                for tensor in self._away:
                    device.held.pop(id(tensor), None)
                super().end()

        class Counted(Window):
            def __init__(self, where, sizes):
                super().__init__(where, sizes)
                self.bytes = sum(sizes)
                device.windows.append(self)

            def close(self):
                device.windows.remove(self)
                super().close()

        monkeypatch.setattr(partial_offload, "bring", bring)
        monkeypatch.setattr(partial_offload, "Loan", Booked)
        monkeypatch.setattr(partial_offload, "Window", Counted)

    def bytes_of(self, module: nn.Module) -> int:
        """Bytes of a component on the device; the window's belong to nobody."""
        tensors = [*module.parameters(), *module.buffers()]
        passing = [(slot.buffer.data_ptr(), slot.buffer.nbytes) for window in self.windows for slot in window._slots]
        here = [tensor for tensor in tensors if self.held.get(id(tensor)) == tensor.data_ptr()]
        return sum(
            tensor.nbytes
            for tensor in here
            if not any(start <= tensor.data_ptr() < start + size for start, size in passing)
        )

    def look(self, pipe) -> None:
        window = sum(window.bytes for window in self.windows)
        self.peaks["window"] = max(self.peaks.get("window", 0), window)
        if not self.moved:
            return
        self.moved = False
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                self.peaks[name] = max(self.peaks.get(name, 0), self.bytes_of(part))

    def watch(self, pipe) -> None:
        """Look at the start of every layer with weights of every component."""
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                for module in part.modules():
                    if module._parameters and not module._modules:
                        module.register_forward_pre_hook(lambda *_: self.look(pipe))
