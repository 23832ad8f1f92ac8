"""How messages count things and cut texts."""


def many(count, noun):
    """ "1 row", "1,221 rows" """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds):
    """ "40 seconds", "2.5 minutes" """
    return f"{seconds / 60:,.1f} minutes" if seconds >= 60 else many(round(seconds), "second")


def shortened(text, length=80):
    """The text in quotes on one line; one that is longer than `length` is cut, which "…" says."""
    return repr(text if len(text) <= length else f"{text[: length - 1]}…")


def first_of(names):
    """ "a", "a and 3 more" """
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"
