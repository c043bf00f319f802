"""Tests with other people's trainers, whose imports take half a minute: not even collected unless asked for."""

from __future__ import annotations

import os

import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Whether this folder is passed over: None leaves it to pytest."""
    return "not integrations" in config.getoption("markexpr") or None
