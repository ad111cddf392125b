"""Plans for cards of the catalog, and what they take and why."""

from __future__ import annotations

from diffusers_turbo.facts.device import DeviceFacts
from diffusers_turbo.planning.plan import Plan
from diffusers_turbo.planning.planner import plan
from tests.planning.architectures import facts_of


def actions_of(made: Plan) -> list[str]:
    return [step.action for step in made.steps]


def reason_of(made: Plan, action: str) -> str:
    return next(item.reason for item in (*made.steps, *made.rejected) if item.action == action)


def plan_on(card: str, name: str = "sd15", model_dtype: str = "float16", **request) -> Plan:
    return plan(facts_of(name, model_dtype), DeviceFacts.card(card), **request)
