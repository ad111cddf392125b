from __future__ import annotations

import json

import pytest

from diffusers_turbo.errors import InvalidOptionError
from diffusers_turbo.facts.device import DeviceFacts
from diffusers_turbo.planning.options import SDPAAttention
from diffusers_turbo.planning.plan import Plan, Rejected, Step
from diffusers_turbo.planning.planner import plan
from tests.planning.architectures import facts_of, without_exact_tiles


def _some_plan() -> Plan:
    return plan(without_exact_tiles(facts_of("sdxl")), DeviceFacts.card("RTX 2060"), batch_size=2, vram_budget="3.5GB")


def test_a_plan_round_trips_through_json():
    made = _some_plan()
    assert Plan.from_json(made.to_json()) == made
    assert json.loads(made.to_json())["format_version"] == 1


def test_the_text_names_steps_lossy_ones_and_memory():
    made = _some_plan()
    text = made.explain()
    assert text == str(made)
    assert not made.exact
    for step in made.steps:
        assert step.reason in text
        line = next(line for line in text.splitlines() if f". {step.action}(" in line)
        assert line.endswith("LOSSY") == (not step.exact)
    for item in made.rejected:
        assert item.reason in text
    assert "decode: " in text
    assert "GiB" in text


def test_a_plan_without_steps_says_so():
    text = Plan(steps=(), rejected=()).explain()
    assert "none, the pipeline stays as it is" in text
    assert Plan(steps=(), rejected=()).fits is None


def test_a_step_gives_its_options_back_checked():
    step = Step(action="enable_sdpa", options={"backend": "flash"}, reason="because", exact=True)
    assert step.typed_options() == SDPAAttention(backend="flash")
    with pytest.raises(InvalidOptionError, match="backend = 'warp'"):
        Step(action="enable_sdpa", options={"backend": "warp"}, reason="because", exact=True).typed_options()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no json", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'format_version'"),
        (json.dumps({**Plan(steps=(), rejected=()).as_dict(), "format_version": 99}), "format_version 99"),
        (json.dumps({**Plan(steps=(), rejected=()).as_dict(), "steps": [{"action": "x"}]}), "missing 3 required"),
        (
            Plan(steps=(), rejected=(Rejected(action="fly", options={}, reason="", exact=True),)).to_json(),
            "unknown actions fly",
        ),
    ],
)
def test_what_is_no_plan_is_refused(text, found):
    with pytest.raises(InvalidOptionError, match=f"Plan.from_json.*{found}.*needed: the JSON text of Plan.to_json"):
        Plan.from_json(text)
