"""Numbers for people: bytes and operations in readable units."""

from __future__ import annotations

_DECIMAL = ("", "k", "M", "G", "T", "P", "E")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def in_bytes(value: float) -> str:
    """Return ``value`` bytes with three digits: ``1.25 GiB``."""
    return _scaled(value, 1024, _BINARY)


def in_units(value: float, unit: str = "") -> str:
    """Return ``value`` with three digits and a decimal prefix: ``12.3 TFLOP``, ``110 M``."""
    return _scaled(value, 1000, tuple(f"{prefix}{unit}" for prefix in _DECIMAL)).rstrip()


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    power = 0
    while power + 1 < len(units) and abs(value) >= 999.5:
        value, power = value / step, power + 1
    digits = 0 if abs(value) >= 99.95 or not power else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {units[power]}"
