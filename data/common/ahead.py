"""Work that is begun before its result is asked for; results come in the order of the items."""

import collections
from concurrent.futures import Future


def behind(start, finish, items, most):
    """Yields finish(start(item)) for each item, `most` items behind: so many are started and not finished."""
    started = collections.deque()
    for item in items:
        started.append(start(item))
        if len(started) > most:
            yield finish(started.popleft())
    while started:
        yield finish(started.popleft())


def ahead(pool, work, items, most):
    """work(item) for each item, computed by the pool at most `most` items before it is asked for."""
    return behind(lambda item: pool.submit(work, item), Future.result, items, most)
