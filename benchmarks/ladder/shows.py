"""What each row of the ladder shows: one sentence, written by hand after measuring.

A test holds the sentences against the results: every row measured has one.
"""

SHOWS: dict[str, str] = {}
