"""What a password or a token may be in is blanked out, and nothing else."""

from __future__ import annotations

import pytest

from dmaml_pl.errors import redact


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://me:s3cret@host:5000/x", "http://***@host:5000/x"),
        ("https://tok3n@host/x", "https://***@host/x"),
        ("postgresql://me:s3@cret@host/db", "postgresql://***@host/db"),
        ("postgresql://me:s3/cret@host:5432/db", "postgresql://***@host:5432/db"),
        ("postgresql://:s3cret@host/db", "postgresql://***@host/db"),
        ("mysql+pymysql://me:1234@host/db", "mysql+pymysql://***@host/db"),
        ("postgresql://host/db?user=me&password=s3cret&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("https://host/x?token=s3cret", "https://host/x?token=***"),
        ("https://host/x?X-Amz-Signature=s3cret#top", "https://host/x?X-Amz-Signature=***#top"),
        ("see 'http://me:s3cret@host' and http://a:b@c", "see 'http://***@host' and http://***@c"),
    ],
)
def test_redact_blanks_users_passwords_and_tokens_of_addresses(given: str, expected: str) -> None:
    assert redact(given) == expected


def test_redact_keeps_what_holds_no_password() -> None:
    assert redact("sqlite:///a/b.db s3://bucket/a=b?version=3") == "sqlite:///a/b.db s3://bucket/a=b?version=3"
    assert redact("http://host:5000/a@b time 12:30 me@host") == "http://host:5000/a@b time 12:30 me@host"
