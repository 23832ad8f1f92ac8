"""Work that is begun before its result is asked for. Results come in the order of the items."""

import collections
from concurrent.futures import Future


def behind(start, finish, items, most):
    """Yield finish(start(item)) for each item, with up to `most` later items started before it is finished."""
    started = collections.deque()
    for item in items:
        started.append(start(item))
        if len(started) > most:
            yield finish(started.popleft())
    while started:
        yield finish(started.popleft())


def ahead(pool, work, items, most):
    """Yield work(item) for each item, computed in the pool, with up to `most` later items given to the pool before."""
    return behind(lambda item: pool.submit(work, item), Future.result, items, most)
