"""The switches that hand a component to a compiler."""

from __future__ import annotations

import os
from pathlib import Path

from .actions import exporting
from .planning import options as opt
from .switching import Switching


class Compiles(Switching):
    """Part of TurboMixin: torch.compile, torch.jit.trace and AOTInductor, in place and reversible."""

    def compile_unet(
        self,
        mode: str | None = None,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        regional: bool = False,
        backend: str = "inductor",
        cache_dir: bool | str | os.PathLike[str] | None = None,
    ) -> None:
        """Exact: compile the UNet in place; class, state-dict keys, LoRA and saving keep working.

        If compiling fails, the call goes on eagerly and so does the module from then on; a warning and the report say
        why. With `fullgraph=True` the error is raised.

        Args:
            mode, backend: as in `torch.compile`.
            fullgraph: refuse graph breaks, and raise whatever keeps the module from being compiled.
            dynamic: True and False as in `torch.compile`. None compiles the first size for itself and the second for
                all sizes, however height and width go on to change; so too for the batch, and for the prompt's length.
            regional: compile each repeated block instead of the whole: a much shorter first image, a little less speed.
            cache_dir: keep what was compiled in this folder, and look there first: the next process starts fast. True
                means $DIFFUSERS_TURBO_CACHE or else the user's cache folder. The files hold code that will run; one
                that another user could have written is not read.
        """
        self._enable(
            opt.CompileUNet(
                mode=mode,
                fullgraph=fullgraph,
                dynamic=dynamic,
                regional=regional,
                backend=backend,
                cache_dir=cache_dir,  # type: ignore[arg-type]
            )
        )

    def compile_transformer(
        self,
        mode: str | None = None,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        regional: bool = False,
        backend: str = "inductor",
        cache_dir: bool | str | os.PathLike[str] | None = None,
    ) -> None:
        """Exact: compile the transformer in place; arguments as for `compile_unet`."""
        self._enable(
            opt.CompileTransformer(
                mode=mode,
                fullgraph=fullgraph,
                dynamic=dynamic,
                regional=regional,
                backend=backend,
                cache_dir=cache_dir,  # type: ignore[arg-type]
            )
        )

    def compile_vae(
        self,
        mode: str | None = None,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        regional: bool = False,
        backend: str = "inductor",
        cache_dir: bool | str | os.PathLike[str] | None = None,
    ) -> None:
        """Exact: compile the VAE's encoder and decoder in place; arguments as for `compile_unet`."""
        self._enable(
            opt.CompileVAE(
                mode=mode,
                fullgraph=fullgraph,
                dynamic=dynamic,
                regional=regional,
                backend=backend,
                cache_dir=cache_dir,  # type: ignore[arg-type]
            )
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

    def export_unet(
        self,
        path: str | os.PathLike[str],
        *,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        dynamic: bool = True,
    ) -> Path:
        """Compile the UNet ahead of time and write it, without weights, for `load_exported_unet` in other processes.

        Takes minutes and changes nothing of the pipeline. The file holds native code for this kind of GPU, this CPU and
        these versions of torch and diffusers; it is checked against the UNet itself before it is written.

        Args:
            path: the file, ending in ".pt2"; one that is there is replaced.
            height, width: pixels of the pictures that the code is tuned for; by default the model's own.
            batch_size: pictures per call that it is tuned for.
            dynamic: leave batch, height, width and length of the prompt open; if not, only the given ones run.

        Returns:
            the file's absolute path.

        Raises:
            InvalidOptionError: a size that is no multiple of 8, or a path that can't be written.
            NotSupportedError: adapters, hooks, processors or inputs that can't be exported.
            ActionFailedError: torch.export or AOTInductor failed.
        """
        return exporting.export_unet(self, path, height=height, width=width, batch_size=batch_size, dynamic=dynamic)

    def load_exported_unet(self, path: str | os.PathLike[str]) -> None:
        """Exact: run the UNet as code that `export_unet` compiled ahead of time, on this pipeline's own weights.

        Loading takes a fraction of a second and no second copy of the weights. Changes of weights, in place or by
        exchange, are in the next picture. A call that the code was not made for (another dtype, ControlNet, adapters,
        other processors) runs the UNet itself, and the report says why. The file runs native code: it has to be your
        own, and nobody else may be able to write to it.

        Args:
            path: what `export_unet` wrote.

        Raises:
            NotSupportedError: a file that is broken, not to be trusted, or made for another UNet, machine or version.
        """
        self._enable(opt.LoadExportedUNet(path=os.fspath(path)))

    def unload_exported_unet(self) -> None:
        """Switch `load_exported_unet` off."""
        self._disable("load_exported_unet")
