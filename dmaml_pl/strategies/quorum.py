"""Workers that come and go, on torchft: who takes part in a merge, and how one that joins gets the training.

Each worker is a replica of torchft's. Its lighthouse says at every meeting who is there: whoever lives and has come,
of which those at the latest step are *members*, and the others *guests*. Members meet at merges and where they gather
what each has, all in the same order. A guest takes part in whatever the members do without adding to it, until they
hand it the training at the beginning of a run, from which on it is a member. At the very first meeting all are guests,
and the first of them begins the training: so there is one way to join, whenever a worker comes.

A meeting that somebody leaves half-way may have succeeded for some. torchft counts each worker's own steps: whoever has
missed one finds itself behind at the next meeting, and ends, to be started anew and handed the training again. Where
two workers are at the same step with different weights, as one that was cut off at the end of a merge may be, those
that are fewer are behind.

Legend: P values of a payload.
"""

import io
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.distributed import TCPStore, distributed_c10d  # type: ignore[attr-defined]  # PyTorch does not say that it exports it

from dmaml_pl.errors import ConfigError, LeftBehindError, NobodyLeftError, WorkerLostError
from dmaml_pl.launching.waits import told_after
from dmaml_pl.strategies.replica import address_towards, answers, import_manager, new_group, no_transport

POLL_SECONDS = 0.0002
CONNECT_SECONDS = 10.0
"""At its start a worker waits so long for a lighthouse that is not there yet."""
CALL_SECONDS = 30.0
"""A call among workers that are all there takes no longer than so many seconds."""
START_SECONDS = 60.0
"""The first worker waits so long for the others that were asked for, before it begins with those who have come."""
SILENCE_SECONDS = 3.0
"""After so many seconds without a lighthouse it is told who is waited for."""

_SUM, _GATHER, _HAND_OVER = range(3)
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)

T = TypeVar("T")


class Seat(NamedTuple):
    """What each worker tells at the beginning of a meeting.

    Attributes:
        step: meetings that it has behind it; 0 of a guest.
        since: the step at which it became a member.
        time_ms: its clock, in ms since 1970.
        digest: of the weights that it started the run from; the same on all, or some are of another training.
        kept: meetings up to which the tracking store has what was logged, as far as it knows.
    """

    step: int
    since: int
    time_ms: int
    digest: int
    kept: int


class Quorum:
    """This worker's place among those that are there.

    Args:
        lighthouse: address of torchft's lighthouse, `http://host:port`.
        name: of this worker; by it those who came together are ordered.
        timeout: seconds that it waits for a meeting, before it gives up.
        check: raises an error if this process is to stop.
        tells: whether this worker tells that it waits for the lighthouse: one of each machine.

    Attributes:
        rank: of this worker among the members; those who have been there longest come first, so that worker 0 stays.
        size: how many members there are.
        guests: whether somebody waits to be handed the training.
        time_ms: worker 0's clock at the last meeting, the same on all.
        kept: as in `Seat`, by worker 0.

    Raises:
        ConfigError: torchft is not installed, or there is no lighthouse.
    """

    def __init__(
        self, lighthouse: str, name: str, timeout: float, check: Callable[[], None], *, tells: bool = False
    ) -> None:
        Manager = import_manager()  # noqa: N806 - a class
        for logger in ("torchft", "torchft_quorums", "torchft_commits", "torchft_errors"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)  # it is told here
        self._lighthouse, self._timeout, self._check, self._tells = lighthouse, timeout, check, tells
        here = address_towards(lighthouse)
        call = timedelta(seconds=min(CALL_SECONDS, timeout))
        # Of which torchft makes a corner for each group that this worker is the first of.
        self._store = TCPStore(here, 0, is_master=True, wait_for_workers=False)
        self._group = new_group(here, call)
        try:
            with self._never_silent(CONNECT_SECONDS):
                self._manager: Any = Manager(
                    pg=self._group,
                    load_state_dict=None,
                    state_dict=None,
                    min_replica_size=1,
                    use_async_quorum=False,
                    timeout=call,
                    quorum_timeout=timedelta(seconds=timeout),
                    connect_timeout=timedelta(seconds=CONNECT_SECONDS),
                    rank=0,
                    world_size=1,
                    store_addr=here,
                    store_port=self._store.port,
                    lighthouse_addr=lighthouse,
                    replica_id=name,
                    hostname=here,
                    checkpoint_transport=no_transport(),
                    init_sync=False,
                    quorum_retries=int(timeout),
                )
        except RuntimeError as error:
            raise ConfigError(
                f"TORCHFT_LIGHTHOUSE is {lighthouse.rpartition('@')[2]}, where no lighthouse answers: start "
                "`torchft_lighthouse --min_replicas 1` there, or unset it, and dmaml starts one for the workers of "
                "this machine."
            ) from error
        self.rank, self.size, self.guests = 0, 1, False
        self.time_ms, self.kept, self._since = 0, 0, 0

    @property
    def step(self) -> int:
        """Meetings that this worker has behind it."""
        return int(self._manager.current_step())

    # -- joining ---------------------------------------------------------------------------------------------------

    def join(self, wanted: int, *, may_begin: bool = True) -> dict[str, Any] | None:
        """Wait until this worker is a member; returns the training that it is handed, None if it begins it.

        Args:
            wanted: workers that are to be there when a training begins.
            may_begin: whether it may begin one; not where it was lost, and is to join those who are left.

        Raises:
            NobodyLeftError: the training that it was to join has ended, or lost all its workers.
            WorkerLostError: there was no meeting within the timeout.
        """
        begins = time.monotonic() + START_SECONDS
        deadline = time.monotonic() + self._timeout + START_SECONDS
        under_way, self._since = False, 0 if may_begin else -1
        while True:
            self._check()
            seats = self._meet(deadline)
            if seats is None:
                continue
            deadline = time.monotonic() + self._timeout + START_SECONDS
            step = max(seat.step for seat in seats)
            if step:
                under_way = True
                handed = self._attempt(partial(self._be_guest, seats))
                if handed is not None:
                    self._become_member(seats)
                    return handed
            elif under_way or max(seat.since for seat in seats) < 0:
                raise NobodyLeftError("the training that this worker was to join has ended, or lost all its workers.")
            elif self._group.rank() == _first_that_may(seats) and (len(seats) >= wanted or time.monotonic() > begins):
                self._at_step(1)
                self._since, self.guests = 1, len(seats) > 1
                return None
            else:
                time.sleep(0.05)

    def _be_guest(self, seats: list[Seat]) -> dict[str, Any] | None:
        kind, length, code = max(self._gather_numbers([-1, 0, 0]))
        if kind == _SUM:
            self._wait(self._group.allreduce([torch.zeros(length, dtype=_TYPES[code])], _sum()))
        elif kind == _GATHER:
            self._gather_bytes(torch.empty(0, dtype=torch.uint8), length)
        else:
            payload = torch.empty(length, dtype=torch.uint8)
            self._wait(self._group.broadcast_one(payload, _order(seats)[0]))
            training: dict[str, Any] = _from_bytes(payload)
            return training
        return None

    def _become_member(self, seats: list[Seat]) -> None:
        step = max(seat.step for seat in seats) + 1
        self._at_step(step)
        self._since = step
        self._sit_down([seat if seat.step else seat._replace(step=step - 1, since=step) for seat in seats])

    # -- what members do -------------------------------------------------------------------------------------------

    def hand_over(self, training: Callable[[], dict[str, Any]]) -> None:
        """Make members of the guests: worker 0 gives them the training, as it is at the beginning of a run."""

        def act(seats: list[Seat]) -> None:
            payload = _to_bytes(training()) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
            length = max(row[1] for row in self._gather_numbers([_HAND_OVER, len(payload), 3]))
            payload = payload if self.rank == 0 else torch.empty(length, dtype=torch.uint8)
            self._wait(self._group.broadcast_one(payload, _order(seats)[0]))
            step = max(seat.step for seat in seats)
            handed = [seat if seat.step == step else seat._replace(step=step, since=step + 1) for seat in seats]
            self._sit_down(handed)

        self._together(act)

    def sum(self, payload: Callable[[], Tensor], digest: int) -> Tensor:
        """The sum of all members' payloads, (P,).

        Args:
            payload: makes this worker's, when its rank and the number of members are known.
            digest: of the weights that the run began with.

        Raises:
            LeftBehindError: the others have gone on without this worker.
            WorkerLostError: there was no meeting within the timeout.
        """

        def act(seats: list[Seat]) -> Tensor:
            own = payload()
            summed = own.cpu()
            if self.guests:
                self._gather_numbers([_SUM, summed.numel(), _TYPES.index(summed.dtype)])
            self._wait(self._group.allreduce([summed], _sum()))
            return summed.to(own.device)

        return self._together(act, digest)

    def gather(self, own: Any) -> list[Any]:
        """What every member gives, by rank; raises as `sum`."""

        def act(seats: list[Seat]) -> list[Any]:
            payload = _to_bytes(own)
            lengths = [length for _, length, _ in self._gather_numbers([_GATHER, len(payload), 3])]
            rows = self._gather_bytes(payload, max(lengths))
            return [_from_bytes(rows[place][: lengths[place]]) for place in _order(seats)]

        return self._together(act)

    def leave(self) -> None:
        """Tell the others, by silence, that they need not wait for this worker."""
        self._manager.shutdown(wait=False)
        self._group.abort()

    def _together(self, act: Callable[[list[Seat]], T], digest: int = 0) -> T:
        deadline = time.monotonic() + self._timeout + START_SECONDS
        while True:
            self._check()
            seats = self._meet(deadline, digest)
            if seats is None:
                continue
            if not self._manager.is_participating():
                self._be_left_behind()
            self._sit_down(seats)
            if not self._alike(seats):
                self._attempt(self._disagree)
                continue
            done: list[T] = []
            self._attempt(lambda: done.append(act(seats)))  # noqa: B023 - it is called at once
            if done and self._manager.should_commit():
                return done[0]

    def _alike(self, seats: list[Seat]) -> bool:
        order = _order(seats)
        digests = Counter(seats[place].digest for place in order)
        most = max(digests, key=lambda digest: (digests[digest], digest == seats[order[0]].digest))
        if seats[self._group.rank()].digest != most:
            self._be_left_behind()
        return len(digests) == 1

    def _be_left_behind(self) -> NoReturn:
        self.leave()
        raise LeftBehindError("the others have gone on without this worker.")

    @staticmethod
    def _disagree() -> NoReturn:
        raise RuntimeError("some are of another training")

    def _sit_down(self, seats: list[Seat]) -> None:
        order = _order(seats)
        self.rank, self.size, self.guests = order.index(self._group.rank()), len(order), len(order) < len(seats)
        self.time_ms, self.kept = seats[order[0]].time_ms, seats[order[0]].kept

    # -- meetings --------------------------------------------------------------------------------------------------

    def _meet(self, deadline: float, digest: int = 0) -> list[Seat] | None:
        """Wait for the others; returns what each tells, by its place in the group, None where that has failed."""
        if time.monotonic() > deadline:
            raise WorkerLostError(
                f"this worker has met nobody for trainer.strategy.timeout ({self._timeout:g} s): is the lighthouse "
                "there, which TORCHFT_LIGHTHOUSE names? The last checkpoint, if there was one yet, is kept."
            )
        try:
            with self._never_silent(deadline - time.monotonic()):
                self._manager.start_quorum(allow_heal=False, timeout=timedelta(seconds=self._timeout))
        except (RuntimeError, TimeoutError):  # the lighthouse is away; it may come again
            self._check()
            time.sleep(0.2)
            return None
        own = Seat(self.step, self._since, time.time_ns() // 1_000_000, digest, self.kept)
        seats: list[Seat] = []
        self._attempt(lambda: seats.extend(Seat(*row) for row in self._gather_numbers(own)))
        return seats or None

    @contextmanager
    def _never_silent(self, limit: float) -> Iterator[None]:
        """Tell, while a block lasts, that it waits for the lighthouse, where that is so; `limit` seconds at most."""
        if not self._tells:
            yield
            return

        def tell() -> None:
            if not answers(self._lighthouse):
                where = self._lighthouse.rpartition("@")[2]
                print(f"Waiting {limit:.0f} s at most for the lighthouse at {where} ...", file=sys.stderr, flush=True)

        with told_after(SILENCE_SECONDS, tell):
            yield

    def _attempt(self, call: Callable[[], T]) -> T | None:
        """Make a call that fails where a worker is lost; torchft then forms the group anew at the next meeting."""
        try:
            if not self._manager.errored():
                return call()
        except RuntimeError as error:
            self._manager.report_error(error)
        self._manager.should_commit()
        return None

    def _at_step(self, step: int) -> None:
        self._manager.load_state_dict({"step": step, "batches_committed": 0})

    def _gather_numbers(self, own: Any) -> list[list[int]]:
        row = torch.tensor(own, dtype=torch.int64)
        rows = [torch.empty_like(row) for _ in range(self._group.size())]
        self._wait(self._group.allgather([rows], [row], _of_gather()))
        return [each.tolist() for each in rows]

    def _gather_bytes(self, own: Tensor, length: int) -> list[Tensor]:
        padded = torch.zeros(length, dtype=torch.uint8)
        padded[: len(own)] = own
        rows = [torch.empty_like(padded) for _ in range(self._group.size())]
        self._wait(self._group.allgather([rows], [padded], _of_gather()))
        return rows

    def _wait(self, work: Any) -> None:
        """Wait for a call, and hear signals meanwhile."""
        while not work.is_completed():
            time.sleep(POLL_SECONDS)
        work.wait()


def digest_of(weights: Tensor) -> int:
    """A number that tells two vectors of weights, (P,), apart by their bits."""
    bits = weights.detach().contiguous().view(torch.int32).to(torch.int64)
    return int((bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum())


def _order(seats: list[Seat]) -> list[int]:
    """The members' places in the group, by rank."""
    step = max(seat.step for seat in seats)
    return sorted((place for place, seat in enumerate(seats) if seat.step == step), key=lambda p: (seats[p].since, p))


def _first_that_may(seats: list[Seat]) -> int:
    return next(place for place, seat in enumerate(seats) if seat.since >= 0)


def _sum() -> Any:
    options: Any = distributed_c10d.AllreduceOptions()
    options.reduceOp = torch.distributed.ReduceOp.SUM
    return options


def _of_gather() -> Any:
    return distributed_c10d.AllgatherOptions()  # type: ignore[attr-defined]  # PyTorch does not say that it exports it


def _to_bytes(value: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _from_bytes(payload: Tensor) -> Any:
    return torch.load(io.BytesIO(payload.numpy().tobytes()), weights_only=False)
