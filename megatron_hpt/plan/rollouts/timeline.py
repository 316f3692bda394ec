"""When engines and trainer work and when they wait, with `rollout.max_lag` batches ahead. Pure; no torch.

A small simulation of what the coordinator does: batch s may be sampled from version s - lag of the weights on, as many
sequences at a time as a server takes, in the order of the data; a batch is trained when it is whole and the one before is; a
new version stops the engines for its transfer. Without lag a step is therefore rollouts, training and transfer one after the
other. With it a step takes what the busier side takes, or, where neither is busy, 1/(lag + 1) of all three.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

from megatron_hpt.plan.rollouts.lengths import Lengths
from megatron_hpt.plan.rollouts.rollout_timing import Decoding

GRAIN = 1 / 64
"""Of a server's slots: fewer stay empty until more are free, so that groups are not cut ever smaller."""
MOST_GROUPS = 512
"""Groups into which a batch is cut, about: where it is many times what a server takes, they are larger than a grain."""
MOST_ROUNDS = 8
"""Times that a server's sequences are divided where they do not run at once, so that each division has all lengths."""
STEPS_A_LAG = 8
"""Steps that are simulated for each batch that may be under way; the second half of them is measured."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, are an order without a pattern."""


@dataclass(frozen=True)
class Generation:
    """Seconds of one batch's rollouts, alone on the engines."""

    prefill: float
    decode: float
    tail: float
    """From when fewer than half as many sequences run as at the beginning."""
    running: int
    """Sequences that one server decodes at a time."""

    @property
    def total(self) -> float:
        """One after the other."""
        return self.prefill + self.decode + self.tail


@dataclass(frozen=True)
class BatchWork:
    """What one step asks of one server and of the trainer."""

    decoding: Decoding
    lengths: Lengths
    prompts: float
    """Of one server."""
    samples: int
    """Of a prompt, whose tokens are computed once for all of them."""
    training_s: float
    transfer_s: float
    in_flight: str
    """What happens to requests that are under way when new weights arrive: `transfer.in_flight`."""

    @property
    def sequences(self) -> float:
        """Of one server."""
        return self.prompts * self.samples

    @property
    def prefill_s(self) -> float:
        """Seconds for the prompts of one server."""
        return self.prompts * self.lengths.prompt * self.decoding.prefill_s

    def least_s(self, lag: int, alone_s: float) -> float:
        """Return seconds that no step is quicker than: the trainer's work, the engines' at full load, or a batch on its way.

        Args:
            alone_s: of the batch alone on the engines.
        """
        lengths = self.lengths
        running = min(self.decoding.slots, (lag + 1) * self.sequences)
        # In the long run a sequence that is being decoded is as old as this on average.
        age = sum(tokens**2 * share for tokens, share in lengths.parts) / (2 * lengths.response)
        step = self.decoding.step_s(running, running * (lengths.prompt + age))
        engines = self.prefill_s + self.sequences * lengths.response / running * step
        # A version is made from a batch that was begun lag + 1 versions before.
        cycle = (alone_s + self.training_s + self.transfer_s) / (lag + 1)
        return max(cycle, self.training_s + self.transfer_s, engines + self.transfer_s)


@dataclass(frozen=True)
class Timeline:
    """A step as it repeats itself."""

    seconds: float
    trainer_idle: float
    """Share of it in which the trainer waits for a batch."""
    engines_idle: float
    """Share of it in which the engines have nothing to do."""
    running: float
    """Sequences that one server decodes on average, while it has any."""


class _Server:
    """One server, whose sequences are groups of equal length: each decoding step is a token for all that run."""

    def __init__(self, work: BatchWork) -> None:
        self._work, self._slots = work, work.decoding.slots
        self._clock = 0.0
        """Decoding steps so far."""
        self._owed = 0.0
        """Seconds of prompts that are to be computed before the next step."""
        self._running: list[tuple[float, int, float, float, int]] = []
        """Heap of (clock at the end, number, sequences, tokens, batch)."""
        self._waiting: deque[tuple[float, float, int]] = deque()
        self._begun = 0
        self.sequences = 0.0
        """That run."""
        self._tokens_before = 0.0
        """Clock at the begin of each sequence that runs, added up."""

    def admit(self, batch: int) -> None:
        """Take the requests of a batch."""
        rounds = min(MOST_ROUNDS, math.ceil(self._work.sequences / self._slots))
        parts = list(self._work.lengths.parts)
        mixed = [parts[i] for i in sorted(range(len(parts)), key=lambda i: i * GOLDEN % 1)]
        each = self._work.sequences / rounds
        self._waiting.extend((tokens, share * each, batch) for _ in range(rounds) for tokens, share in mixed)
        self._owed += self._work.prefill_s
        self._begin()

    def _begin(self) -> None:
        grain = min(self._slots, max(self._slots * GRAIN, self._work.sequences / MOST_GROUPS))
        while self._waiting:
            tokens, sequences, batch = self._waiting[0]
            free = self._slots - self.sequences
            begun = min(sequences, free)
            if begun < min(sequences, grain) - 1e-9:
                return
            self._waiting.popleft()
            if sequences - begun > 1e-9:
                self._waiting.appendleft((tokens, sequences - begun, batch))
            heapq.heappush(self._running, (self._clock + tokens, self._begun, begun, tokens, batch))
            self._begun += 1
            self.sequences += begun
            self._tokens_before += begun * self._clock

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do."""
        return not self._running and self._owed <= 0

    def _cached(self, steps: float) -> float:
        """Return the tokens of all sequences that run, so many steps from now."""
        return self.sequences * (self._work.lengths.prompt + self._clock + steps) - self._tokens_before

    def seconds_to_end(self) -> float:
        """Return the seconds until the next group ends; infinity where none runs."""
        if not self._running:
            return math.inf
        steps = self._running[0][0] - self._clock
        return self._owed + steps * self._work.decoding.step_s(self.sequences, self._cached(steps / 2))

    def run(self, seconds: float) -> None:
        """Work for so long, at most until the next group ends."""
        paid = min(self._owed, seconds)
        self._owed -= paid
        if self._running and seconds > paid:
            steps = self._running[0][0] - self._clock
            whole = steps * self._work.decoding.step_s(self.sequences, self._cached(steps / 2))
            self._clock += steps * min(1.0, (seconds - paid) / whole) if whole else steps

    def end(self) -> tuple[int, float]:
        """Take the next group away, which has ended; return its batch and its sequences."""
        clock, _, sequences, tokens, batch = heapq.heappop(self._running)
        self._clock, self._owed = clock, 0.0
        self.sequences -= sequences
        self._tokens_before -= sequences * (clock - tokens)
        if not self._running:
            self.sequences = self._tokens_before = 0.0  # what rounding has left
        self._begin()
        return batch, sequences

    def update(self) -> None:
        """Take new weights: what runs keeps its keys and values, computes them again, or begins again."""
        if self._work.in_flight == "recompute":
            self._owed += self._cached(0) * self._work.decoding.prefill_s
        elif self._work.in_flight == "abort":
            self._owed += self.sequences * self._work.lengths.prompt * self._work.decoding.prefill_s
            self._running = [(self._clock + entry[3], *entry[1:]) for entry in self._running]
            heapq.heapify(self._running)
            self._tokens_before = self.sequences * self._clock


def alone(work: BatchWork) -> Generation:
    """Return the seconds of one batch on engines that have nothing else to do."""
    server = _Server(work)
    server.admit(0)
    most = server.sequences
    decode = tail = 0.0
    prefill = work.prefill_s
    server.run(prefill)
    while (seconds := server.seconds_to_end()) < math.inf:
        if server.sequences < most / 2:
            tail += seconds
        else:
            decode += seconds
        server.end()
    return Generation(prefill, decode, tail, round(most))


def timeline(work: BatchWork, lag: int) -> Timeline:
    """Return a step of a run whose batches may be `lag` versions behind, without the first ones, in which engines fill."""
    steps = STEPS_A_LAG * (lag + 1) if lag else 1
    server, version, now, ready = _Server(work), 0, 0.0, math.inf
    left = {}
    for batch in range(lag + 1):
        left[batch] = work.sequences
        server.admit(batch)
    trainer_idle = engines_idle = decoded = 0.0
    marks = [(0.0, 0.0, 0.0, 0.0)]
    while version < steps:
        end = server.seconds_to_end()
        is_trained = ready - now <= end
        seconds = ready - now if is_trained else end
        trainer_idle += seconds if ready == math.inf else 0.0
        engines_idle += seconds if server.is_idle else 0.0
        decoded += seconds * server.sequences
        now += seconds
        if is_trained:
            server.run(seconds)
            server.update()
            now, ready, version = now + work.transfer_s, math.inf, version + 1
            marks.append((now, trainer_idle, engines_idle, decoded))
            left[version + lag] = work.sequences
            server.admit(version + lag)
        else:
            batch, sequences = server.end()
            left[batch] -= sequences
        if ready == math.inf and left[version] < 1e-6 * work.sequences:
            ready = now + work.training_s
    seconds, waited, empty, decoded = (after - before for before, after in zip(marks[steps // 2], marks[-1], strict=True))
    busy = seconds - empty - (steps - steps // 2) * work.transfer_s
    return Timeline(seconds / (steps - steps // 2), waited / seconds, empty / seconds, decoded / busy)
