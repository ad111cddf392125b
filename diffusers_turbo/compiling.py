"""The switches that hand a component to a compiler."""

from __future__ import annotations

from .planning import options as opt
from .switching import Switching


class Compiles(Switching):
    """Part of TurboMixin: torch.compile and torch.jit.trace, in place and reversible."""

    def compile_unet(
        self,
        mode: str | None = None,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        regional: bool = False,
        backend: str = "inductor",
    ) -> None:
        """Exact: compile the UNet in place; class, state-dict keys, LoRA and saving keep working.

        Args:
            mode, fullgraph, dynamic, backend: as in `torch.compile`.
            regional: compile each repeated block instead of the whole: a much shorter first image, a little less speed.
        """
        self._enable(
            opt.CompileUNet(mode=mode, fullgraph=fullgraph, dynamic=dynamic, regional=regional, backend=backend)
        )

    def compile_transformer(
        self,
        mode: str | None = None,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        regional: bool = False,
        backend: str = "inductor",
    ) -> None:
        """Exact: compile the transformer in place; arguments as for `compile_unet`."""
        self._enable(
            opt.CompileTransformer(mode=mode, fullgraph=fullgraph, dynamic=dynamic, regional=regional, backend=backend)
        )

    def compile_vae(
        self,
        mode: str | None = None,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        regional: bool = False,
        backend: str = "inductor",
    ) -> None:
        """Exact: compile the VAE's encoder and decoder in place; arguments as for `compile_unet`."""
        self._enable(
            opt.CompileVAE(mode=mode, fullgraph=fullgraph, dynamic=dynamic, regional=regional, backend=backend)
        )

    def uncompile(self) -> None:
        """Switch every compilation off."""
        for action in ("compile_unet", "compile_transformer", "compile_vae"):
            self._disable(action)

    def trace_unet(
        self,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        check: bool = True,
        save_path: str | None = None,
        load_path: str | None = None,
    ) -> None:
        """Exact: run the UNet as a torch.jit.trace.

        Args:
            height, width: size in pixels to trace at; by default the model's own.
            batch_size: pictures per call to trace with.
            check: compare with the UNet itself at a size and batch that were not traced.
            save_path: write the trace there.
            load_path: read a trace from there instead of making one.
        """
        self._enable(
            opt.TraceUNet(
                height=height, width=width, batch_size=batch_size, check=check, save_path=save_path, load_path=load_path
            )
        )

    def untrace_unet(self) -> None:
        """Switch `trace_unet` off."""
        self._disable("trace_unet")
