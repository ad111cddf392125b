"""How a method of the pipeline becomes a lever in its ledger."""

from __future__ import annotations

from .actions.ledger import close_ledger, ledger_of, open_ledger
from .planning.options import Options


class Switching:
    """Part of TurboMixin: what each switch's method is made of."""

    def _enable(self, options: Options) -> None:
        try:
            open_ledger(self).enable(self, options)
        finally:
            close_ledger(self)

    def _disable(self, action: str) -> None:
        open_ledger(self).disable(self, action)
        close_ledger(self)

    def _is_off(self, action: str) -> bool:
        ledger = ledger_of(self)
        return ledger is None or ledger.find(action) is None
