"""What a turbo pipeline says of itself, how far its pictures are from the reference, and the way back."""

from __future__ import annotations

from typing import Any

from .actions.ledger import close_ledger, ledger_of
from .report import Report, report_on
from .verification.check import Verification, Yardstick
from .verification.inputs import STEPS, make_inputs


class LooksAndUndoes:
    """Part of TurboMixin: report, verification, undo."""

    def turbo_report(self) -> Report:
        """Return what is switched on, what each lever says of itself, and what was left alone; `print` it."""
        return report_on(self, ledger_of(self))

    def turbo_verify(
        self,
        prompts: str | list[str] | None = None,
        *,
        pairs: int | None = None,
        steps: int = STEPS,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 1,
        reference: Any = None,
    ) -> Verification:
        """Compare this pipeline's pictures with the naive fp32 ones of the same latents and embeddings.

        Args:
            prompts: what to draw; by default eight prompts of this package.
            pairs: prompt-and-seed pairs, the prompts repeated or cut; by default one a prompt. Exactness is claimed on
                64 pairs of a trained model.
            steps: denoising steps of each picture.
            height, width: pixels; by default the model's own.
            guidance_scale: by default the pipeline's own.
            batch_size: pictures per call.
            reference: a pipeline to compare with instead of an untouched copy of this one. It stays as it is.

        Returns:
            distances, verdict (exact, close or different) and whether it is what the levers promise; `print` it.

        Raises:
            NotSupportedError: the scheduler draws noise in each step and the dtype is not fp32, or nothing fits.
        """
        inputs = make_inputs(
            prompts,
            pairs,
            steps=steps,
            height=height,
            width=width,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
        )
        return Yardstick(self, inputs, reference).measure(self)

    def turbo_undo(self) -> Report:
        """Switch everything off and remove every trace; return what had to be left alone, since others changed it."""
        ledger = ledger_of(self)
        left_alone = tuple(ledger.undo(self)) if ledger is not None else ()
        close_ledger(self, forget=True)
        return report_on(self, None, left_alone)
