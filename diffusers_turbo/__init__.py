"""diffusers_turbo: any diffusers pipeline as fast as its GPU allows, or as small as its VRAM needs, and reversible.

pipe = turbo(StableDiffusionPipeline.from_pretrained(...))
pipe = auto_optimize(pipe)
print(pipe.turbo_report())
"""

from .entry import auto_optimize, turbo
from .errors import TurboError
from .facts.device import DeviceFacts, probe
from .mixin import TurboMixin
from .planning.plan import Plan
from .planning.planner import plan
from .prediction.predict import predict_memory

__all__ = [
    "DeviceFacts",
    "Plan",
    "TurboError",
    "TurboMixin",
    "auto_optimize",
    "plan",
    "predict_memory",
    "probe",
    "turbo",
]
__version__ = "0.1.0"
