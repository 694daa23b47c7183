"""The two forms of GELU by torch's names, as the compiled functions count them (native/include/zcore/gelu.hpp)."""

from zcore.core.errors import ConfigError

__all__ = ["form_of"]

_FORMS = {"none": 0, "tanh": 1}


def form_of(op: str, approximate: str) -> int:
    """The form that torch's functional.gelu calls `approximate`; raises ConfigError for another word."""
    if approximate not in _FORMS:
        raise ConfigError(f"{op}: approximate is {approximate!r}; expected 'none' (by erf) or 'tanh'.")
    return _FORMS[approximate]
