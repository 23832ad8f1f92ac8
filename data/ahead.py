"""Work done in other threads before its result is asked for, in the order it was given."""

import collections


def ahead(pool, work, items, most):
    """work(item) for each item in order, computed by the pool at most `most` items before it is asked for."""
    pending = collections.deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
