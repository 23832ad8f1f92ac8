"""Several GPUs: the first rank deals whole batches to all ranks, and takes what they made of them back in order.

    batch         0        1        2        3        4
    3 ranks    rank 1   rank 2   rank 0   rank 1   rank 2

How a picture is rounded depends on the batch that it is encoded in. The batches are those of one rank, and so are the
order of their rows and the bytes of the cache. The first rank does all else: it looks, decodes, names what is bad,
writes and speaks. The others are sent an encoder's description, then pixels or captions, and send rows back; they hold
no lock, and read no folder but the model's, which several hosts must see under the same name. torchrun says by
environment variables who is who (data/common/ranks.py). A picture of 1024 × 1024 is a message of 3 MB, its row 262 KB.

torch is imported where it is needed, because a precompute on one rank that has nothing to do does without it.
"""

import collections
import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from data.common import ranks, safe
from data.common.errors import MachineError, UserError

PATIENCE = timedelta(days=1)  # of ranks that wait while the first one looks at all pictures
FIRST, CPU = 0, "cpu"


class Alone:
    """One rank encodes all batches itself."""

    def load(self, described, device):
        """-> the encoder that is `described`, TextEncoders or VAE (data/encoders.py), loaded."""
        return described.load(device)

    def encode(self, encoder, batches, stop):
        """Encode each (tag, batch), and yield (tag, rows), in order. stop: gets a signal that another rank received."""
        return encoder.encode(batches)


class First(Alone):
    """The first rank of several, which has the batches and wants all the rows."""

    def __init__(self):
        _join()
        self.others = [Other(index) for index in range(1, ranks.count())]

    def load(self, described, device):
        for other in self.others:
            other.tell("load", described)
        return described.load(device)

    def encode(self, encoder, batches, stop):
        dealt = collections.deque()  # of each batch without rows: its tag, and another rank's promise of them, or None

        def own():
            for other, (tag, batch) in zip(itertools.cycle([*self.others, None]), batches):
                dealt.append((tag, other and other.encode(batch)))
                if not other:
                    yield tag, batch
            for other in self.others:
                other.tell("no more")

        def of_others():
            while dealt and dealt[0][1]:
                tag, promise = dealt.popleft()
                signal, rows = promise.result()
                stop.received = stop.received or signal
                if isinstance(rows, UserError):
                    raise rows
                yield tag, rows

        for tag, rows in encoder.encode(own()):
            yield from of_others()
            dealt.popleft()
            yield tag, rows
        yield from of_others()

    def dismiss(self, code):
        """Let the other ranks end with an exit code, when they have sent what is still asked of them."""
        for other in self.others:
            other.tell("end", code)
        for other in self.others:
            other.sending.shutdown()
            other.receiving.shutdown()


class Other:
    """Another rank, as the first one sees it. Its threads wait for it, so that a signal finds the main thread free."""

    def __init__(self, index):
        self.index, self.sending, self.receiving = index, ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def tell(self, what, value=None):
        self.sending.submit(send, self.index, what, value)

    def encode(self, batch):
        """-> the promise of (the first signal that the rank received, the batch's rows or a UserError)"""
        self.tell("batch", batch)
        return self.receiving.submit(receive, self.index)


@contextlib.contextmanager
def first():
    """What the first rank encodes with: Alone, or First as long as it lasts; then the others end as it ends."""
    if ranks.count() == 1:
        yield Alone()
        return
    crew, code = First(), 1
    try:
        yield crew
        code = 0
    except UserError as error:
        code = error.code
        raise
    finally:
        crew.dismiss(code)


def serve(compute_on):
    """What every other rank does: encode what the first one sends. -> the exit code that it says at the end.

    compute_on(): the device. An error that a user can act on is the first rank's to report, in its batch's turn.
    """
    import torch

    _join()
    stop = safe.Signals()  # the first rank decides when the work is at a good place to end
    orders, encoder, failure = Orders(stop), None, None
    while orders.what != "end":
        if orders.what == "load":
            encoder = failure = None  # the text encoders and the VAE are never in memory together
            torch.cuda.empty_cache()
            try:
                encoder = orders.value.load(compute_on())
            except UserError as error:
                failure = error
        if orders.what == "batch" and not failure:
            try:
                for _, rows in encoder.encode(orders.batches()):
                    send(FIRST, stop.received, rows)
                continue  # with the order that came behind the batches
            except UserError as error:
                failure = error
        if failure and orders.what == "batch":
            send(FIRST, stop.received, failure)
        orders.take()
    return orders.value


class Orders:
    """What the first rank wants, one thing at a time: `what`, with a `value`."""

    def __init__(self, stop):
        self.stop = stop
        self.take()

    def take(self):
        """Wait for the next one. When the first rank is gone, the process ends; after a signal that is no error."""
        try:
            self.what, self.value = receive(FIRST)
        except MachineError:
            if self.stop.received:
                raise SystemExit(128 + self.stop.received) from None
            raise

    def batches(self):
        """Yield (None, batch) as long as batches come."""
        while self.what == "batch":
            yield None, self.value
            self.take()


def send(index, what, value=None):
    """Send (what, value) to another rank. A value that is a tensor on the CPU goes as it is, others pickled."""
    import torch
    import torch.distributed as dist

    tensor = isinstance(value, torch.Tensor)
    with naming(index):
        dist.send_object_list([(what, tensor, (value.shape, value.dtype) if tensor else value)], index, device=CPU)
        if tensor:
            dist.send(value, index)


def receive(index):
    """-> the next (what, value) from another rank. Raises MachineError when it is gone."""
    import torch
    import torch.distributed as dist

    box = [None]
    with naming(index):
        dist.recv_object_list(box, index, device=CPU)
    what, tensor, value = box[0]
    if tensor:
        shape, dtype = value
        value = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())  # so that no GPU waits for a copy
        with naming(index):
            dist.recv(value, index)
    return what, value


@contextlib.contextmanager
def naming(index):
    """In here an error of gloo's is that the other rank is gone."""
    try:
        yield
    except RuntimeError:
        raise MachineError(f"rank {index} ended; its own last lines say why") from None


def _join():
    """Wait until all that torchrun started are there."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=PATIENCE)
