"""Warps that run Python code in random order, with mbarriers and copies that finish late.

Barriers count as the hardware's do: a wait for a parity passes when the phase of that parity is
complete. `Warps` refuses a wait that would pass on any phase but the waiter's next one.
"""

from __future__ import annotations

import random
import threading
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes of the phase that is not complete yet."""

    count: int
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def __post_init__(self):
        self.pending = self.count

    def arrive(self, arrivals):
        self.pending -= arrivals
        assert self.pending >= 0, "more arrivals than the barrier counts"
        self.settle()

    def add_bytes(self, number):
        self.bytes += number
        self.settle()

    def settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Agent:
    """Warps that run one method of the kernel in step."""

    def __init__(self, cta, name, threads, first_thread, body):
        self.cta, self.name, self.threads, self.first_thread = cta, name, threads, first_thread
        self.body, self.done, self.failure, self.ready = body, False, None, lambda: True
        self.turn = threading.Semaphore(0)
        self.elected = False
        self.waits = {}  # the phase to wait for next, by barrier
        self.open_group, self.groups = [], []  # of bulk stores; a store is [has been read]
        self.output = None
        self.products, self.running = {}, []  # wgmma: what a stage held, stages still read


def check_seeds(check, name: str, rows: tuple[int, ...], num_experts: int) -> None:
    """Five times check(rows of every expert, clusters, seed); a failure says what was drawn."""
    for seed in range(5):
        draw = random.Random(f"{name} {seed}")
        counts, clusters = draw.choices(rows, k=num_experts), draw.choice((1, 2, 3))
        try:
            check(counts, clusters, seed)
        except AssertionError as error:
            where = f"rows {counts}, {clusters} clusters, seed {seed}"
            raise AssertionError(f"{where}: {str(error)[:500]}") from error


class Warps:
    """Agents, events that are still to happen, and barriers, numbered within a CTA."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.agents, self.events, self.barriers = [], [], {}

    def play(self):
        """Runs agents and events in random order, some of them much slower than others."""
        self.control = threading.Semaphore(0)
        self.over = False
        speed = {agent: self.random.choice((0.02, 0.3, 1.0)) for agent in self.agents}
        event_speed = self.random.choice((0.02, 0.3, 3.0))
        self.eager = self.random.choice((0.0, 0.5, 0.9))  # how often an agent goes on at a step
        threads = [threading.Thread(target=self.live, args=(agent,)) for agent in self.agents]
        for thread in threads:
            thread.start()
        try:
            while True:
                ready = [agent for agent in self.agents if not agent.done and agent.ready()]
                weights = [speed[agent] for agent in ready]
                if self.events:
                    ready.append(None)
                    weights.append(event_speed)
                if not ready:
                    break
                chosen = self.random.choices(ready, weights)[0]
                if chosen is None:
                    self.events.pop(self.random.randrange(len(self.events)))()
                else:
                    self.agent = chosen
                    chosen.turn.release()
                    self.control.acquire()
                    if chosen.failure is not None:
                        raise chosen.failure
        finally:
            self.over = True
            for agent in self.agents:
                agent.turn.release()
            for thread in threads:
                thread.join()
        stuck = [f"CTA {agent.cta} {agent.name}" for agent in self.agents if not agent.done]
        assert not stuck, f"deadlock: {stuck}"

    def live(self, agent):
        agent.turn.acquire()
        try:
            if not self.over:
                agent.body()
                agent.done = True
        except BaseException as failure:  # the scheduler raises it
            agent.failure = failure
        self.control.release()

    def pause(self, ready=None):
        """Lets others run, until `ready` if given."""
        agent = self.agent
        agent.ready = ready or (lambda: True)
        if (ready is not None and not ready()) or self.random.random() >= self.eager:
            self.control.release()
            agent.turn.acquire()
            if self.over:
                raise SystemExit
        agent.ready = lambda: True

    # ------------------------------------------------------------------ barriers

    @contextmanager
    def elect_one(self):
        self.agent.elected = True
        yield
        self.agent.elected = False

    def barrier(self, pointer, cta=None):
        return self.barriers[self.agent.cta if cta is None else cta, pointer]

    def wait(self, pointer, parity):
        """Passes when the phase of this parity is complete, which must be the waiter's next one."""
        agent, barrier = self.agent, self.barrier(pointer)
        phase = agent.waits.setdefault(pointer, 0 if parity == 1 else 1)
        assert (phase + 1) % 2 == parity, f"{agent.name} skips a phase of barrier {pointer}"
        self.pause(lambda: barrier.phase % 2 != parity)
        assert barrier.phase == phase, f"{agent.name} took another phase of barrier {pointer}"
        agent.waits[pointer] += 1

    def arrive(self, pointer):
        """One arrival of the elected lane, or of all threads."""
        self.barrier(pointer).arrive(1 if self.agent.elected else self.agent.threads)
        self.pause()

    def expect(self, pointer, number):
        assert self.agent.elected
        self.barrier(pointer).add_bytes(number)
        self.barrier(pointer).arrive(1)

    def commit_group(self):
        self.agent.groups.append(self.agent.open_group)
        self.agent.open_group = []

    def wait_group(self, pending, read):
        groups = self.agent.groups
        older = groups[: max(0, len(groups) - pending)]
        self.pause(lambda: all(state[0] for group in older for state in group))
