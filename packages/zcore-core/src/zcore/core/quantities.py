"""Bytes and other numbers as people read them."""

__all__ = ["shown_bytes", "two_digits"]


def shown_bytes(num_bytes: float) -> str:
    """In the largest unit of which it is about one or more, in at most 7 characters.

    >>> [shown_bytes(each) for each in (0, 999, 1000, 16 * 2**20, 1.5 * 2**30)]
    ['0 B', '999 B', '1 KiB', '16 MiB', '1.5 GiB']
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 999.5:
            return f"{two_digits(num_bytes)} {unit}"
        num_bytes /= 1024
    return f"{two_digits(num_bytes)} TiB"


def two_digits(number: float) -> str:
    """Two digits that count, or all before the point.

    >>> [two_digits(each) for each in (0, 1.0, 9.94, 9.96, 123.4)]
    ['0', '1', '9.9', '10', '123']
    """
    return f"{number:.1f}".removesuffix(".0") if number < 9.95 else f"{number:.0f}"
