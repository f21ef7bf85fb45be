"""Passwords in addresses, blanked out of whatever is shown, logged or kept."""

import re

_PASSWORD = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")


def redact(text: str) -> str:
    """Blank out the `user:password` of every URI in a text: whoever sees the MLflow run must not get them."""
    return _PASSWORD.sub("***", text)
