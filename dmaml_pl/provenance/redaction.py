"""Passwords and tokens in addresses, blanked out of whatever is shown, logged or kept."""

import re

BLANK = "***"

_OF_USER = re.compile(
    r"""(?<=://)                         # after the scheme:
    (?: [^\s/@:'"]+                      # a user, who may be a token,
      | (?! [^\s/@:]* : \d+ (?:[/?#\s'"]|$) )  # or, where that is no host with its port,
        [^\s/@:'"]* : [^\s'"]+           # a user and a password, in which even @ and / may stand,
    )(?=@)                               # before the host
    """,
    re.VERBOSE,
)
_IN_QUERY = re.compile(
    r"""([?&;] [\w.-]* (?:passw(?:or)?d|pwd|token|secret|key|signature|sig|credential) [\w.-]* =) [^&;#\s'"]+""",
    re.VERBOSE | re.IGNORECASE,
)


def redact(text: str) -> str:
    """Blank out user, password and tokens of every URI in a text: whoever sees the MLflow run must not get them.

    Where a password holds an unescaped slash after digits alone, it cannot be told from a port and a path.
    """
    return _IN_QUERY.sub(rf"\1{BLANK}", _OF_USER.sub(BLANK, text))
