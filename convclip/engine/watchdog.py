"""Names the rank that the others of a run wait for in vain: one that is dead, silent, or stands still.

Progress of any rank counts as life. The ranks listen to one another in a ring, so that however many there are each asks
the store for two or three values a second; only where rank 0 stands still does it look at all of them.
"""

from __future__ import annotations

import json
import time

from convclip.engine.peers import Ending, Peers
from convclip.engine.procfs import Process, is_gone, memory_kills, process
from convclip.engine.whereabouts import Whereabouts

# Of every end that is not planned, but for a user's mistake (2) and an exception (1).
EXIT_CODE = 71
# From when a rank of this machine is gone: for what it said to arrive, or the launcher to end the others.
GONE_SECONDS = 10.0
# A gap between two looks that this process itself was stopped for.
_OWN_GAP = 5.0


class Watchdog:
    """Of one rank: `look` once a second, from another thread than the main one."""

    def __init__(self, peers: Peers, seconds: float) -> None:
        """From the main thread; `seconds` is the recipe's `stop.watchdog_s`, 0 for never."""
        self.peers, self.seconds = peers, seconds
        self.whereabouts = Whereabouts()
        self._looked = self._since = time.monotonic()
        self._gone: dict[int, float] = {}
        self._killed_before = memory_kills()

    def look(self, step: int) -> Ending | None:
        """Why the run should end, if it should; `step` is how many steps are done."""
        peers, here, now = self.peers, self.whereabouts, time.monotonic()
        here.look()
        if now - self._looked > _OWN_GAP:
            # This process was stopped and goes on, perhaps with all others.
            here.forget()
            self._since = now
        self._looked = now
        peers.beat = {
            "step": step, "place": here.place, "collective": here.collective, "still": here.still(),
        }  # fmt: skip
        if peers.world == 1 or not self.seconds:
            return None
        return self._gone_rank(now) or self._silent_rank(now) or self._still_ranks()

    def gone_ranks(self) -> list[int]:
        """The ranks of this machine whose processes are no more, and that did not say so."""
        peers = self.peers
        return [number for number, there in self.near() if is_gone(there) and number not in peers.left]

    def about_gone(self, numbers: list[int]) -> str:
        """What is to be said of them."""
        names = ", ".join(self._name(number) for number in numbers)
        kills = memory_kills() - self._killed_before
        memory = f"; the kernel has killed {kills} of this machine's processes for want of memory" if kills > 0 else ""
        return f"{names} ended without a word: killed{memory}"

    def near(self) -> list[tuple[int, Process]]:
        """The other ranks of this machine, and their processes."""
        places, own = self.peers.places, self.peers.rank
        return [
            (number, place.process)
            for number, place in enumerate(places)
            if number != own and place.host == places[own].host and place.process is not None
        ]

    def _gone_rank(self, now: float) -> Ending | None:
        gone = self.gone_ranks()
        self._gone = {number: self._gone.get(number, now) for number in gone}
        if not any(now - since > GONE_SECONDS for since in self._gone.values()):
            return None
        return self._ending(self.about_gone(gone), gone)

    def _silent_rank(self, now: float) -> Ending | None:
        peers = self.peers
        without_store = now - max(peers.heard, self._since)
        if without_store > self.seconds:
            culprits = [0] if peers.rank else []
            return self._ending(f"{self._silence(0, without_store)}; with it the ranks' store", culprits)
        silent = now - max(peers.next_moved, self._since)
        if silent > self.seconds and without_store < self.seconds / 2 and peers.next not in peers.left:
            return self._ending(f"{self._silence(peers.next, silent)}{self._last(peers.next_beat)}", [peers.next])
        return None

    def _still_ranks(self) -> Ending | None:
        """All of them, seen by rank 0: those outside of collectives are what the others wait for."""
        peers, still = self.peers, self.whereabouts.still()
        if peers.rank:
            return None
        peers.listens_to_all = still > self.seconds / 2
        if still < self.seconds or len(peers.beats) < peers.world:
            return None
        beats = {**peers.beats, 0: peers.beat}
        if min(beat["still"] for beat in beats.values()) < self.seconds:
            return None
        places: dict[str, list[int]] = {}
        for number, beat in beats.items():
            where = f"in {beat['collective']}" if beat["collective"] else f"at {beat['place']}"
            places.setdefault(f"{where} after step {beat['step']}", []).append(number)
        stuck = [number for number, beat in beats.items() if not beat["collective"]]
        parts = [f"{', '.join(map(self._name, numbers[:3]))}{_more(numbers)} {at}" for at, numbers in places.items()]
        seconds = min(beat["still"] for beat in beats.values())
        return self._ending(f"no rank has moved on for {seconds:.0f} s: {'; '.join(parts)}", stuck)

    def _silence(self, number: int, seconds: float) -> str:
        place, own = self.peers.places[number], self.peers.places[self.peers.rank]
        now = process(place.pid) if place.host == own.host else None
        why = "its process is stopped" if now is not None and now.state in "Tt" else "stopped, dead or cut off"
        return f"{self._name(number)} has been silent for {seconds:.0f} s ({why})"

    @staticmethod
    def _last(beat: bytes) -> str:
        if not beat:
            return ""
        last = json.loads(beat)
        where = f"in {last['collective']}" if last.get("collective") else f"at {last.get('place')}"
        return f", last heard of after step {last.get('step')} {where}"

    def _name(self, number: int) -> str:
        return f"rank {number} (host {self.peers.places[number].host}, pid {self.peers.places[number].pid})"

    def _ending(self, line: str, culprits: list[int]) -> Ending:
        return Ending(line, EXIT_CODE, self.peers.rank, tuple(culprits))


def _more(numbers: list[int]) -> str:
    return f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
