"""What every optimizer checks of its settings."""

from collections.abc import Mapping
from typing import Any

from zcore.core.errors import ConfigError

__all__ = ["check_settings"]


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a rate, decay or eps below zero, or a decay of averages outside [0, 1)."""
    for key, value in settings.items():
        if key in {"betas", "momentum"}:
            if not all(0.0 <= each < 1.0 for each in (value if isinstance(value, tuple) else (value,))):
                raise ConfigError(f"{name}: {key} is {value!r}; averages decay by factors of at least 0 and below 1.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and not value >= 0.0:
            raise ConfigError(f"{name}: {key} is {value!r}, which has to be 0 or more.")
