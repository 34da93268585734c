"""Numbers that both the recipe and the data may give: they have to agree."""

from __future__ import annotations

from villa.errors import ConfigError


def settle(option: str, given: int | None, found: int | None) -> int:
    """Return the number that the recipe gives or the data fixes.

    Args:
        option: dotted name of the option, for messages: ``"model.num_labels"``.
        given: what the recipe says, or None.
        found: what the data says, or None.

    Raises:
        ConfigError: they contradict each other, or neither is known.
    """
    if given is not None and found is not None and given != found:
        raise ConfigError(f"{option}={given}, but the data has {found}: remove the option or set it to {found}")
    settled = found if given is None else given
    if settled is None:
        raise ConfigError(f"{option} is not known: the data does not say, so the recipe has to give it")
    return settled


def require_positive(**options: int | None) -> None:
    """Check that every given option of the model is at least 1.

    Raises:
        ConfigError: the first one that is not.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise ConfigError(f"model.{name}={value}, but it has to be at least 1")
