"""TurboMixin: the switches as methods, each a line or two that hands an options value to the ledger.

Where diffusers has a method of the same name, name and signature are kept. `enable_x` twice is once; `disable_x` when
x is not on does nothing and says so in the log (logger "diffusers_turbo").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .actions.attention import FusedAttention
from .actions.host import host_method
from .actions.ledger import ledger_of, open_ledger
from .actions.memory_fallback import take_back
from .algebra import SparesWork
from .compiling import Compiles
from .copying import CopiesItsLevers
from .easing import EasesTheVAE
from .looking import LooksAndUndoes
from .looping import RelievesTheHost
from .planning import options as opt


class TurboMixin(RelievesTheHost, SparesWork, EasesTheVAE, Compiles, LooksAndUndoes, CopiesItsLevers):
    """Adds this package's switches to a diffusers pipeline.

    Get one from `turbo(pipe)`, or write `class MyPipe(TurboMixin, StableDiffusionPipeline)`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give each subclass a `__call__` that keeps its host's name, signature and docstring."""
        super().__init_subclass__(**kwargs)
        if "__call__" not in cls.__dict__:
            below = cls.__mro__[cls.__mro__.index(TurboMixin) + 1 :]
            host_call = next((base.__dict__["__call__"] for base in below if "__call__" in base.__dict__), None)
            if host_call is not None:
                cls.__call__ = _in_scope(host_call)  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline inside the call scopes of what is switched on."""
        return _run_in_scope(self, super().__call__, args, kwargs)  # type: ignore[misc]

    # Attention

    def enable_naive_attention(self) -> None:
        """Exact: the reference attention, which materialises the whole score matrix `[B*H, N, M]`."""
        self._enable(opt.NaiveAttention())

    def disable_naive_attention(self) -> None:
        """Switch `enable_naive_attention` off."""
        self._disable("enable_naive_attention")

    def enable_sdpa(self, backend: str = "auto") -> None:
        """Exact: torch's scaled_dot_product_attention in every layer that can take it.

        Args:
            backend: "auto", "flash", "efficient", "cudnn" or "math". Layers that cannot take the named kernel (the
                VAE's head of 512) keep "auto" and are listed in the report.

        Raises:
            NotSupportedError: no layer of the denoiser can take the backend; the reasons are listed.
        """
        self._enable(opt.SDPAAttention(backend=backend))

    def disable_sdpa(self) -> None:
        """Switch `enable_sdpa` off."""
        self._disable("enable_sdpa")

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Exact: xFormers' memory-efficient attention in every layer whose kernel really runs here.

        Args:
            attention_op: an xFormers operator, or None for xFormers' own choice.

        Raises:
            MissingPackageError: xFormers is not installed.
            NotSupportedError: no kernel of it runs on this device with this dtype and head size.
        """
        self._enable(opt.XFormersAttention(attention_op=attention_op))

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Switch `enable_xformers_memory_efficient_attention` off."""
        self._disable("enable_xformers_memory_efficient_attention")

    def enable_attention_slicing(self, slice_size: str | int | None = "auto", max_bytes: int | None = None) -> None:
        """Exact: attention in slices over batch x heads and, where needed, over query rows.

        Args:
            slice_size: "auto" (half of the heads at a time), "max" (one head at a time) or a number of heads; None
                switches slicing off, as in diffusers, unless `max_bytes` is given.
            max_bytes: bound on scores, softmax and upcast copies, in bytes, beyond q, k, v and the output.
        """
        if slice_size is None and max_bytes is None:
            self.disable_attention_slicing()
        else:
            self._enable(opt.SlicedAttention(slice_size=slice_size, max_bytes=max_bytes))

    def disable_attention_slicing(self) -> None:
        """Switch `enable_attention_slicing` off."""
        self._disable("enable_attention_slicing")

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Exact: one matrix product for queries, keys and values (keys and values in cross-attention).

        It takes no memory: the separate weights become slices of the fused ones. Checkpoints stay as they are.

        Args:
            unet: fuse the denoiser's layers (a transformer's too).
            vae: fuse the VAE's layers.
        """
        fresh = self._is_off("fuse_qkv_projections")
        self._enable(opt.FusedQKV(unet=unet, vae=vae))
        try:
            # Only this package's processors know the fused weights; whatever the user chose stays on top.
            open_ledger(self).enable(self, FusedAttention(), below=True)
        except BaseException:
            if fresh:
                self._disable("fuse_qkv_projections")
            raise

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Switch `fuse_qkv_projections` off for the parts named; what stays fused stays.

        Args:
            unet: unfuse the denoiser.
            vae: unfuse the VAE.
        """
        ledger = ledger_of(self)
        lever = ledger.find("fuse_qkv_projections") if ledger else None
        now = lever.options if lever else None
        keep = (now.unet and not unet, now.vae and not vae) if isinstance(now, opt.FusedQKV) else (False, False)
        if any(keep):
            self._enable(opt.FusedQKV(unet=keep[0], vae=keep[1]))
        else:
            self._disable("fuse_qkv_projections")

    # Layout and precision

    def enable_channels_last(self) -> None:
        """Exact: convolution weights `[O, I, H, W]` laid out channels-last."""
        self._enable(opt.ChannelsLast())

    def disable_channels_last(self) -> None:
        """Switch `enable_channels_last` off: every weight gets its own strides back."""
        self._disable("enable_channels_last")

    def enable_fused_kernels(
        self,
        group_norm: bool = True,
        geglu: bool = True,
        linear_geglu: bool = True,
        add_layer_norm: bool = True,
        bias_residual: bool = True,
        upsample_conv: bool = True,
    ) -> None:
        """Exact: what eager PyTorch does in several passes over memory, in one Triton kernel each, without a compiler.

        A call that a kernel cannot take (a recorded gradient, the CPU) runs in plain PyTorch; the report says how many
        layers and why.

        Args:
            group_norm: GroupNorm with SiLU and what a resnet adds before it; needs `enable_channels_last()`.
            geglu: the feed-forward's `value * gelu(gate)`.
            linear_geglu: the same with the projection before it, on Hopper (SM 9.0) in half precision.
            add_layer_norm: a transformer block's residual and the norm of the sum.
            bias_residual: a resnet's last bias and its residual; needs `enable_channels_last()`.
            upsample_conv: upsampling with the convolution after it, computed from the small picture with its weights
                summed (in half precision a rounding more); needs `enable_channels_last()`.

        Raises:
            NotSupportedError: no kernel runs in this process (no CUDA, no Triton), or no layer is of a kind they fit.
        """
        wanted = opt.FusedKernels(
            group_norm=group_norm,
            geglu=geglu,
            linear_geglu=linear_geglu,
            add_layer_norm=add_layer_norm,
            bias_residual=bias_residual,
            upsample_conv=upsample_conv,
        )
        self._enable(wanted)

    def disable_fused_kernels(self) -> None:
        """Switch `enable_fused_kernels` off: every layer has its own forward again."""
        self._disable("enable_fused_kernels")

    def enable_tf32(self) -> None:
        """Lossy: float32 products in TF32 (10 mantissa bits), in force during this pipeline's calls only."""
        self._enable(opt.TF32())

    def disable_tf32(self) -> None:
        """Switch `enable_tf32` off."""
        self._disable("enable_tf32")

    def enable_half_precision(self, dtype: torch.dtype | str | None = None) -> None:
        """Lossy: every weight in half precision; the originals wait in host memory for `disable_half_precision`.

        Args:
            dtype: torch.float16, torch.bfloat16, or their names; None means float16 for UNets, bfloat16 for
                transformers.
        """
        self._enable(opt.HalfPrecision(dtype=dtype))  # type: ignore[arg-type]

    def disable_half_precision(self) -> None:
        """Switch `enable_half_precision` off: the original weights come back bit for bit."""
        self._disable("enable_half_precision")

    # Offload

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Exact: one component at a time on the GPU, the others in host memory.

        Args:
            gpu_id: index of the GPU.
            device: the accelerator, by default the one there is.
        """
        ledger = ledger_of(self)
        top = ledger.top("offload") if ledger else None
        if (
            top is not None
            and top.action == "enable_model_cpu_offload"
            and top.journal is not None
            and device is not None
        ):
            # diffusers calls this method itself at the end of each picture, to send every component home.
            host_method(self, "enable_model_cpu_offload")(gpu_id=gpu_id, device=device)
        else:
            self._enable(opt.ModelOffload(gpu_id=gpu_id, device=device))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Exact: one layer at a time on the GPU: the least memory, and the slowest.

        Args:
            gpu_id: index of the GPU.
            device: the accelerator, by default the one there is.
        """
        self._enable(opt.SequentialOffload(gpu_id=gpu_id, device=device))

    def enable_group_offload(
        self,
        onload_device: torch.device | str | None = None,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | list[str] | None = None,
    ) -> None:
        """Exact: groups of layers in host memory, brought to the GPU when they work, ahead of time with a stream.

        Arguments are those of `DiffusionPipeline.enable_group_offload`; here `onload_device` defaults to the
        accelerator and `num_blocks_per_group` to 1. SDXL's VAE, which is cast to float32 for decoding, is moved as a
        whole.
        """
        self._enable(
            opt.GroupOffload(
                onload_device=onload_device,
                offload_device=offload_device,
                offload_type=offload_type,
                num_blocks_per_group=num_blocks_per_group,
                non_blocking=non_blocking,
                use_stream=use_stream,
                record_stream=record_stream,
                low_cpu_mem_usage=low_cpu_mem_usage,
                offload_to_disk_path=offload_to_disk_path,
                exclude_modules=tuple(exclude_modules) if isinstance(exclude_modules, list) else exclude_modules,
            )
        )

    def enable_partial_offload(
        self,
        resident_bytes: int | str | None = 0,
        pin_memory: bool = True,
        pinned_bytes: int | str | None = None,
        denoiser_leaves: bool = False,
        by_layers: str | tuple[str, ...] | None = None,
        prefetch: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        """Exact: as much of the denoiser on the GPU as fits, the rest streamed while what is before it computes.

        Of the denoiser (and ControlNets) `resident_bytes` stay; what is streamed passes through a window of two groups
        of layers, each as large as the largest layer, which comes on top. The first step learns the order of the
        layers, one at a time. All other components come to work and leave, one at a time. The denoiser may
        be under `enable_cuda_graphs()`: each call of the pipeline records it anew where it leaves or is streamed.

        Args:
            resident_bytes: weights that stay for the whole denoising loop: bytes, or text such as "3GB"; None or "all"
                for all of it.
            pin_memory: keep streamed weights page-locked, which copies to a GPU beside computation need.
            pinned_bytes: bound on that memory, by default half of what the host has free; what does not fit is streamed
                from ordinary memory, which is slower.
            denoiser_leaves: send what stays of the denoiser away as well while another component works: the VAE, and at
                the next picture the text encoders.
            by_layers: names of other components that do not come whole but layer by layer, each as it works: text
                encoders may be larger than all that is there of the denoiser.
            prefetch: copy a group of layers in while the one before it computes; without, the window holds one group
                and is half as large, and computing waits for copies.
            device: the accelerator, by default the one there is.

        Raises:
            NotSupportedError: no accelerator, or a component named in `by_layers` is not there.
        """
        self._enable(
            opt.PartialOffload(
                resident_bytes=resident_bytes,
                pin_memory=pin_memory,
                pinned_bytes=pinned_bytes,
                denoiser_leaves=denoiser_leaves,
                by_layers=by_layers,
                prefetch=prefetch,
                device=device,
            )
        )

    def disable_offload(self) -> None:
        """Switch any offload off: every weight goes back to the device it was on."""
        for option in (opt.ModelOffload, opt.SequentialOffload, opt.GroupOffload, opt.PartialOffload):
            self._disable(option.action)

    def enable_denoiser_slicing(self, slice_size: int = 1) -> None:
        """Exact: denoiser and ControlNets work on `slice_size` samples of the batch at a time.

        A step then takes the memory of so many samples, whatever the batch; with guidance a picture is two. It costs a
        call of the network for each slice, and under offload by layers another passage of the weights. A call with
        arguments whose rows are not known to belong to samples (`cross_attention_kwargs` with tensors) is made whole.

        Args:
            slice_size: samples `[B, ..]` at a time.

        Raises:
            NotSupportedError: the denoiser is of a class of which it is not known that samples are independent.
        """
        self._enable(opt.DenoiserSlicing(slice_size=slice_size))

    def disable_denoiser_slicing(self) -> None:
        """Switch `enable_denoiser_slicing` off."""
        self._disable("enable_denoiser_slicing")

    def enable_memory_fallback(self, allow_tiling: bool = False) -> None:
        """Exact: a component that runs out of device memory makes room, one step at a time, and is called again.

        The steps: free the cache, do without graphs and copies of weights, slice the VAE's batch, decode in exact
        tiles, slice attention that holds its scores, offload more. Each is a switch of its own in the report and stays
        on for the next call. When none is left, the error says what would fit. In force during this pipeline's calls
        only.

        Args:
            allow_tiling: LOSSY if it comes to that: tile the VAE when nothing else is left.
        """
        self._enable(opt.MemoryFallback(allow_tiling=allow_tiling))

    def disable_memory_fallback(self) -> None:
        """Switch `enable_memory_fallback` off: its steps are taken back, and what had made way for them is on again."""
        take_back(self)
        self._disable("enable_memory_fallback")


def _in_scope(host_call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of its own for each class, since `wraps` writes the host's signature onto it."""

    @functools.wraps(host_call)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return TurboMixin.__call__(self, *args, **kwargs)

    return call


def _run_in_scope(pipe: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ledger = ledger_of(pipe)
    if ledger is None:
        return call(*args, **kwargs)
    with ledger.around_call(pipe):
        return call(*args, **kwargs)
