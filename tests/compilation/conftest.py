from __future__ import annotations

import pytest

from tests import dynamo


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Compiled code and counts of one test must not be another's."""
    dynamo.reset()
    yield
    dynamo.reset()
