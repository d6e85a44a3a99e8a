"""What tests of speculation share: drafts of any length, at any time, as if they cost nothing."""

from __future__ import annotations

import pytest

from edgellm.engine import draft_model
from edgellm.engine.drafts import RestingDrafter
from edgellm.engine.nextn_drafts import NextnDrafts
from edgellm.engine.scheduler import Scheduler
from edgellm.engine.speculation import NgramDrafter


def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may be drafted is, so that as much as can be is accepted and rejected."""
    monkeypatch.setattr(Scheduler, "_tokens_per_s", lambda self, n: n)
    monkeypatch.setattr(NgramDrafter, "settle", lambda self, gain: None)
    for name in ("settle", "charge"):
        monkeypatch.setattr(RestingDrafter, name, lambda self, gain: None)
    monkeypatch.setattr(NextnDrafts, "goes_on", lambda self, chance, worth: True)
    monkeypatch.setattr(draft_model._Growing, "goes_on", lambda self, worth: 0 < len(self.draft) < self.n)
