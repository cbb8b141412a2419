"""Rows and wiring become tasks that wait for one another; whether that can end is found out here.

Tasks are numbered: the actions row by row, then the transfers, then the gradient exchanges. Rows
whose stages have no ``U`` get one for each at their end. A transfer follows from a feed whose two
stages are in different rows for a microbatch. An action waits for the one before it in its row and
for the transfers that it reads; a transfer for the action that sends it; an exchange for the last
backward of each copy of its stages; an update for its exchanges.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from autopar.errors import AutoparError
from autopar.ir.schedule import KINDS, Action, Kind, Rows
from autopar.simulator.pipeline import Wiring


class Exchange(NamedTuple):
    """Part ``part`` (from 1) of ``parts`` of a gradient synchronisation; ``None`` is the norm of
    all gradients, which comes after all the others.

    ``triggers``: the last backwards before it; ``rows``: those that take part; ``updates``: the
    actions that wait for it.
    """

    synchronisation: int | None
    part: int
    parts: int
    triggers: tuple[int, ...]
    rows: tuple[int, ...]
    updates: tuple[int, ...]


class Route(NamedTuple):
    """What a feed carries in one direction from one row to another; priced once."""

    feed: int
    backward: bool
    source_row: int
    target_row: int


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """``rows`` with all updates; ``first``: number of each row's first action, and of all actions.

    ``price_of``: for each action, ``stage * len(KINDS)`` + the place of its kind in ``KINDS``.
    ``sender``, ``reader``, ``route_of``: for each transfer, the action whose result it takes, the
    action that waits for it, and its place in ``routes``. ``local``: sender, reader and route of
    what stays within a row. ``order``: all tasks, each after all that it waits for.
    """

    wiring: Wiring
    rows: Rows
    first: tuple[int, ...]
    row_of: list[int]
    price_of: list[int]
    routes: tuple[Route, ...]
    sender: list[int]
    reader: list[int]
    route_of: list[int]
    local: tuple[tuple[int, int, Route], ...]
    exchanges: list[Exchange]
    order: list[int]

    @property
    def actions(self) -> int:
        """How many."""
        return self.first[-1]

    @property
    def transfers(self) -> int:
        """How many."""
        return len(self.sender)

    def action(self, number: int) -> Action:
        row = self.row_of[number]
        return self.rows[row][number - self.first[row]]


def arrange(rows: Rows, wiring: Wiring) -> Arrangement:
    """Tasks of the rows. Linear in their number: about 1 us each.

    Rows that lack an action or have it twice, or that can never end, are an error that names the
    actions.
    """
    rows = _with_updates(rows)
    first = [0]
    row_of: list[int] = []
    price_of: list[int] = []
    for r, row in enumerate(rows):
        first.append(first[-1] + len(row))
        row_of += [r] * len(row)
        price_of += [stage * len(KINDS) + _PLACE[kind] for stage, kind, _, _ in row]
    found = _Found(rows, first, row_of, wiring)
    found.check()
    found.follow_feeds()
    exchanges = _exchanges(rows, first, row_of, wiring)
    line = _Line(rows, first, row_of, found.sender, found.reader, exchanges)
    return Arrangement(
        wiring=wiring,
        rows=rows,
        first=tuple(first),
        row_of=row_of,
        price_of=price_of,
        routes=tuple(found.routes),
        sender=found.sender,
        reader=found.reader,
        route_of=found.route_of,
        local=tuple(found.local),
        exchanges=exchanges,
        order=line.order(),
    )


_PLACE: dict[Kind, int] = {kind: place for place, kind in enumerate(KINDS)}

_LAST_BACKWARD = ("B", "W")


def _with_updates(rows: Rows) -> Rows:
    """Stages without any ``U`` in a row get one at its end, in the order of their last backward."""
    full = []
    for row in rows:
        stages = {action.stage for action in row}
        without = stages - {action.stage for action in row if action.kind == "U"}
        updates = []
        for stage, kind, microbatch, _ in reversed(row):
            if not without:
                break
            if kind in _LAST_BACKWARD and stage in without:
                without.remove(stage)
                updates.append(Action(stage, "U", microbatch))
        full.append((*row, *reversed(updates)))
    return tuple(full)


class _Found:
    """Where in the rows each microbatch's forward and backwards on each stage are."""

    def __init__(
        self, rows: Rows, first: Sequence[int], row_of: Sequence[int], wiring: Wiring
    ) -> None:
        self.routes: list[Route] = []
        self.sender: list[int] = []
        self.reader: list[int] = []
        self.route_of: list[int] = []
        self.local: list[tuple[int, int, Route]] = []
        self._rows, self._first, self._row_of, self._wiring = rows, first, row_of, wiring
        self._microbatches = 1 + max((a.microbatch for row in rows for a in row), default=-1)
        places = wiring.stages * self._microbatches
        self._at: dict[Kind, list[int]] = {kind: [-1] * places for kind in ("F", "B", "I", "W")}
        number = 0
        for row in rows:
            updates: Counter[int] = Counter()
            for stage, kind, microbatch, version in row:
                if version is not None and not 0 <= version <= updates[stage]:
                    raise AutoparError(
                        f"{self._action(number)} uses weights that have seen {version} updates, "
                        f"but its row has made {updates[stage]} of that stage before it"
                    )
                if kind == "U":
                    updates[stage] += 1
                else:
                    if stage >= wiring.stages:
                        raise AutoparError(
                            f"the rows have stage {stage}, the pipeline has stages 0 to "
                            f"{wiring.stages - 1}; make rows for {wiring.stages} stages"
                        )
                    at = self._at[kind]
                    place = stage * self._microbatches + microbatch
                    if at[place] >= 0:
                        raise AutoparError(
                            f"{stage}{kind}{microbatch} is in the rows twice; each action must "
                            "be there once"
                        )
                    at[place] = number
                number += 1
        # the backward that other stages wait for
        self._back = [
            whole if whole >= 0 else part
            for whole, part in zip(self._at["B"], self._at["I"], strict=True)
        ]

    def check(self) -> None:
        """Every microbatch has its forward and then its backward on every stage, in one row."""
        if not self._microbatches:
            raise AutoparError("the rows have no actions; make them for at least one microbatch")
        row_of = self._row_of
        columns = zip(*(self._at[kind] for kind in ("F", "B", "I", "W")), strict=True)
        for place, (forward, whole, part, weights) in enumerate(columns):
            if forward >= 0 and (
                (whole > forward and part < 0 and weights < 0 and row_of[whole] == row_of[forward])
                or (
                    whole < 0
                    and weights > part > forward
                    and row_of[weights] == row_of[forward] == row_of[part]
                )
            ):
                continue
            self._explain(*divmod(place, self._microbatches))

    def _explain(self, stage: int, microbatch: int) -> NoReturn:
        there = {kind: at[stage * self._microbatches + microbatch] for kind, at in self._at.items()}
        has = [kind for kind, number in there.items() if number >= 0]
        spelled = [f"{stage}{kind}{microbatch}" for kind in has]
        if has not in (["F", "B"], ["F", "I", "W"]):
            raise AutoparError(
                f"of microbatch {microbatch} on stage {stage} the rows have "
                f"{', '.join(spelled) or 'nothing'}; they need F and B, or F, I and W"
            )
        lying = {self._row_of[there[kind]] for kind in has}
        if len(lying) > 1:
            raise AutoparError(
                f"{', '.join(spelled)} are in rows {', '.join(map(str, sorted(lying)))}; one row "
                "must have them all, since it keeps what the forward saved"
            )
        in_order = sorted(has, key=there.__getitem__)
        raise AutoparError(
            f"row {lying.pop()} does "
            + " before ".join(f"{stage}{kind}{microbatch}" for kind in in_order)
            + f"; the order must be {', '.join(has)}"
        )

    def follow_feeds(self) -> None:
        """Finds what goes between rows, and what stays within one."""
        many, forward, back = self._microbatches, self._at["F"], self._back
        for feed, (source, target, gradient) in enumerate(self._wiring.feeds):
            given = slice(source * many, source * many + many)
            read = slice(target * many, target * many + many)
            self._follow(feed, False, forward[given], forward[read])
            if gradient:
                self._follow(feed, True, back[read], back[given])

    def _follow(self, feed: int, backward: bool, given: list[int], read: list[int]) -> None:
        row_of, sender, reader, route_of = self._row_of, self.sender, self.reader, self.route_of
        numbers: dict[tuple[int, int], int] = {}
        for a, b in zip(given, read, strict=True):
            rows = (row_of[a], row_of[b])
            if rows[0] != rows[1]:
                number = numbers.get(rows)
                if number is None:
                    number = numbers[rows] = len(self.routes)
                    self.routes.append(Route(feed, backward, *rows))
                sender.append(a)
                reader.append(b)
                route_of.append(number)
            elif a < b:
                self.local.append((a, b, Route(feed, backward, *rows)))
            else:
                raise AutoparError(
                    f"row {rows[0]} does {self._action(b)} before {self._action(a)}, whose result "
                    "it reads; turn them round"
                )

    def _action(self, number: int) -> Action:
        row = self._row_of[number]
        return self._rows[row][number - self._first[row]]


def _exchanges(
    rows: Rows, first: Sequence[int], row_of: Sequence[int], wiring: Wiring
) -> list[Exchange]:
    """The n-th update of a stage in a row goes with the n-th in every other row that has it."""
    if not wiring.synchronisations and not wiring.norm:
        return []
    rounds: dict[int, list[list[tuple[int, int]]]] = defaultdict(list)
    ends = []  # each row's last action that is no update
    for r, row in enumerate(rows):
        backward: dict[int, int] = {}
        of_row: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, action in enumerate(row, first[r]):
            if action.kind in _LAST_BACKWARD:
                backward[action.stage] = number
            elif action.kind == "U":
                if action.stage not in backward:
                    raise AutoparError(f"{action} comes before any gradient of its stage")
                of_row[action.stage].append((backward[action.stage], number))
        ends += [max(backward.values())] if backward else []
        for stage, pairs in of_row.items():
            rounds[stage].append(pairs)
    exchanges: list[Exchange] = []
    for number, (stages, parts) in enumerate(wiring.synchronisations):
        copies = [pairs for stage in stages for pairs in rounds[stage]]
        if len({len(pairs) for pairs in copies}) > 1:
            raise AutoparError(
                f"stages {', '.join(map(str, stages))} exchange gradients but are not updated "
                "equally often in all rows"
            )
        for of_round in zip(*copies, strict=True):
            triggers = tuple(trigger for trigger, _ in of_round)
            updates = tuple(update for _, update in of_round)
            taking_part = tuple(sorted({row_of[trigger] for trigger in triggers}))
            exchanges += [
                Exchange(number, part, parts, triggers, taking_part, updates)
                for part in range(1, parts + 1)
            ]
    if wiring.norm:
        all_updates = [pairs for of_stage in rounds.values() for pairs in of_stage]
        if any(len(pairs) > 1 for pairs in all_updates):
            raise AutoparError(
                "gradients can be clipped by their norm only if each stage is updated once a step"
            )
        updates = tuple(update for pairs in all_updates for _, update in pairs)
        exchanges.append(Exchange(None, 1, 1, tuple(ends), tuple(range(len(rows))), updates))
    return exchanges


class _Line:
    """Puts tasks in an order in which each comes after all that it waits for."""

    def __init__(
        self,
        rows: Rows,
        first: Sequence[int],
        row_of: Sequence[int],
        sender: list[int],
        reader: list[int],
        exchanges: list[Exchange],
    ) -> None:
        self._rows, self._first, self._row_of = rows, first, row_of
        self._sender, self._reader, self._exchanges = sender, reader, exchanges
        self._actions = first[-1]
        self._waits = [0] * self._actions  # how many tasks an action still waits for
        self._sends: list[list[int]] = [[] for _ in range(self._actions)]
        for number, target in enumerate(reader):
            self._sends[sender[number]].append(number)
            self._waits[target] += 1
        self._triggers: dict[int, list[int]] = defaultdict(list)
        self._untriggered: list[int] = []
        before_norm = sum(exchange.synchronisation is not None for exchange in exchanges)
        for number, exchange in enumerate(exchanges):
            norm = exchange.synchronisation is None
            self._untriggered.append(len(exchange.triggers) + (before_norm if norm else 0))
            for trigger in exchange.triggers:
                self._triggers[trigger].append(number)
            for update in exchange.updates:
                self._waits[update] += 1

    def order(self) -> list[int]:
        """A row goes on until it has to wait; when it can go on, it gets in line again."""
        first, row_of, waits = self._first, self._row_of, self._waits
        reader, sends, triggers = self._reader, self._sends, self._triggers
        after_actions, after_transfers = self._actions, self._actions + len(reader)
        at = list(first[:-1])
        order: list[int] = []
        can_go_on = deque(range(len(at)))
        while can_go_on:
            row = can_go_on.popleft()
            number, end = at[row], first[row + 1]
            while number < end and not waits[number]:
                order.append(number)
                for sent in sends[number]:
                    order.append(after_actions + sent)
                    target = reader[sent]
                    waits[target] -= 1
                    if not waits[target] and at[row_of[target]] == target:
                        can_go_on.append(row_of[target])
                if number in triggers:
                    for exchange in self._triggered(triggers[number]):
                        order.append(after_transfers + exchange)
                        for update in self._exchanges[exchange].updates:
                            waits[update] -= 1
                            if not waits[update] and at[row_of[update]] == update:
                                can_go_on.append(row_of[update])
                number += 1
            at[row] = number
        if len(order) < after_transfers + len(self._exchanges):
            self._explain(at)
        return order

    def _triggered(self, by: Iterable[int]) -> list[int]:
        """The exchanges that can begin now; after the last of them, the norm."""
        now = []
        norm = len(self._exchanges) - 1
        for exchange in by:
            self._untriggered[exchange] -= 1
            if not self._untriggered[exchange]:
                now.append(exchange)
                if exchange != norm and self._exchanges[norm].synchronisation is None:
                    self._untriggered[norm] -= 1
                    if not self._untriggered[norm]:
                        now.append(norm)
        return now

    def _explain(self, at: Sequence[int]) -> NoReturn:
        """Follows who waits for whom until a row comes up again."""
        row = next(r for r, number in enumerate(at) if number < self._first[r + 1])
        seen: list[int] = []
        lines: list[str] = []
        while row not in seen:
            seen.append(row)
            missing, why = self._waits_for(at[row], at)
            lines.append(f"row {row} is at {self._action(at[row])}, which {why}")
            row = self._row_of[missing]
        cycle = lines[seen.index(row) :]
        raise AutoparError(
            "these rows can never end:\n  "
            + ";\n  ".join(cycle)
            + f";\n  and row {row} is waited for. Change the order of these actions"
        )

    def _waits_for(self, number: int, at: Sequence[int]) -> tuple[int, str]:
        def undone(task: int) -> bool:
            return task >= at[self._row_of[task]]

        for source, target in zip(self._sender, self._reader, strict=True):
            if target == number and undone(source):
                what = "output" if self._action(source).kind == "F" else "gradient"
                return source, (
                    f"waits for the {what} of {self._action(source)} in row {self._row_of[source]}"
                )
        for exchange in self._exchanges:
            for trigger in exchange.triggers:
                if number in exchange.updates and undone(trigger):
                    return trigger, f"waits for gradients of {self._action(trigger)}"
        raise AssertionError(f"nothing holds back {self._action(number)}")

    def _action(self, number: int) -> Action:
        row = self._row_of[number]
        return self._rows[row][number - self._first[row]]
