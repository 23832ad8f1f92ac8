"""What a JSON that somebody hands in may hold: a rule for each field, and a function that holds a file to its rules.

    TABLE = {"rows": whole(1, 2**31), "schedule": one_of("linear", "cosine", missing="linear"), "comment": None}
    facts = check_fields(TABLE, read_json(path, advice), path, advice)

A field whose rule is None changes nothing and is passed over, as are names that begin with "_". So is a field that the
table does not know as long as it is off (null, false, 0, empty); any other may change what is computed and is refused.
Standard library only.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.common.disk import DISK_ERRORS
from data.common.errors import UserError

REQUIRED = object()  # instead of what a missing field means
DEEPEST = 32  # lists and objects inside each other


@dataclass(frozen=True)
class Rule:
    """What one field may hold.

    wanted   in words, for the message
    fits     value -> bool
    missing  the value that a file without the field means; when there is none, the field must be there
    changes  whether the field changes what is computed, and so belongs to a model's identity
    """

    wanted: str
    fits: Callable
    missing: object = REQUIRED
    changes: bool = True


def whole(least, most, missing=REQUIRED, changes=True):
    return Rule(
        f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most, missing, changes
    )


def number(least, most, missing=REQUIRED, changes=True):
    return Rule(
        f"a number from {least} to {most}", lambda v: type(v) in (int, float) and least <= v <= most, missing, changes
    )


def text(longest=256, missing=REQUIRED, changes=True):
    return Rule(
        f"text of at most {longest} characters", lambda v: type(v) is str and len(v) <= longest, missing, changes
    )


def one_of(*values, missing=REQUIRED, changes=True):
    """One of these values. 1 and 1.0 are the same here, 1 and true are not."""
    wanted = " or ".join(json.dumps(value) for value in values)
    return Rule(
        wanted, lambda v: any(v == w and isinstance(v, bool) == isinstance(w, bool) for w in values), missing, changes
    )


def only(value):
    """This value, which a missing field means as well."""
    return one_of(value, missing=value)


def switch(missing=REQUIRED, changes=True):
    return one_of(True, False, missing=missing, changes=changes)


def each(rule, least, most=None, missing=REQUIRED, changes=True):
    """A list of `least` (to `most`) values that all fit `rule`."""
    most = most or least
    count = f"{least}" if most == least else f"{least} to {most}"
    fits = lambda v: type(v) is list and least <= len(v) <= most and all(map(rule.fits, v))  # noqa: E731
    return Rule(f"a list of {count} ({rule.wanted} each)", fits, missing, changes)


def either(*rules, missing=REQUIRED, changes=True):
    wanted = " or ".join(rule.wanted for rule in rules)
    return Rule(wanted, lambda v: any(rule.fits(v) for rule in rules), missing, changes)


def named(rule, missing=REQUIRED):
    """An object whose fields, of any names, all fit `rule`."""
    fits = lambda v: type(v) is dict and all(map(rule.fits, v.values()))  # noqa: E731
    return Rule(f"named fields ({rule.wanted} each)", fits, missing)


def check_fields(table, values, where, advice):
    """-> {name: value} of all fields that `table` has a rule for, with what the missing ones mean.

    table: {name: Rule, None, or the table of an object inside}. where: what the message names, a file. advice: what the
    user can do.
    Raises UserError naming the first field that breaks its rule, is missing, or is unknown and not off.
    """
    if type(values) is not dict:
        raise UserError(f"{where}: holds {shown(values)} instead of named fields; {advice}")
    for name, value in values.items():
        if value and name not in table and not name.startswith("_"):
            raise UserError(
                f"{where}: {shown(name)} is {shown(value)}: not known here, it may change what is computed; {advice}"
            )
    found = {}
    for name, rule in table.items():
        if rule is None:
            continue
        if type(rule) is dict:
            found[name] = check_fields(rule, values.get(name), f"{where}: {name}", advice)
            continue
        value = values.get(name, rule.missing)
        if value is REQUIRED:
            raise UserError(f"{where}: no {name} in it, which must be {rule.wanted}; {advice}")
        if not rule.fits(value):
            raise UserError(f"{where}: {name} is {shown(value)} instead of {rule.wanted}; {advice}")
        found[name] = value
    return found


def read_json(path, advice, largest=2**20):
    """The content of a JSON file of at most `largest` bytes, as `loads` reads it. Raises UserError naming the file."""
    path = Path(path)
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError("no such file")
        if path.stat().st_size > largest:
            raise ValueError(f"larger than {largest >> 20} MiB")
        return loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not there or damaged ({' '.join(str(error).split())[:100]}); {advice}") from None
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        raise UserError(f"{path}: cannot be read ({error.strerror}); {advice}") from None


def loads(data):
    """json.loads that raises ValueError for a field that is there twice, a number that is not finite, and depth."""
    value = json.loads(data, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"lists and objects nested more than {DEEPEST} deep")
        inside = [v.values() if type(v) is dict else v for v in level if type(v) in (dict, list)]
        level = [value for values in inside for value in values]
    return value


def shown(value):
    """A value for a message: short, on one line."""
    if type(value) is dict:
        return f"an object of {len(value)} fields"
    if type(value) is list and (len(value) > 8 or any(type(v) in (dict, list) for v in value)):
        return f"a list of {len(value)}"
    if type(value) is int and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    words = json.dumps(value)
    return words if len(words) <= 60 else words[:57] + "..."


def _once(pairs):
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is in it twice")
        found[name] = value
    return found


def _finite(word):
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{shown(word)} is no finite number")
    return value
