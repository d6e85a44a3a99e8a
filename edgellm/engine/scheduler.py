"""Continuous batching: who shares the next step, with which tokens, and who gives up blocks for it.

The weights are read once for all tokens of a step, so sixteen answers together cost little more than one. All answers
that wait for their next token come first, then as much of the prompts as there is room; a prompt that comes in while
others answer is taken in small pieces, for each piece delays all of them. Where others wait, or callers may leave, a
step takes no more of a prompt than fits a bounded time, as the last ones measured it; a prompt that is alone has longer
ones, which are broken off, once, when somebody comes in. Where blocks are short, the
youngest request or one whose caller is idle is preempted: it computes again what it has lost. Tokens get the same bits
whoever they share a step with, so nobody's answer depends on any of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgellm.engine import cache
from edgellm.engine.cache import KVCache
from edgellm.engine.requests import Request
from edgellm.engine.snapkv import SnapKV, Watch
from edgellm.engine.speculation import MAX_DRAFT, Ask, Draft, DraftSource, TapSource
from edgellm.formats.errors import ContextFullError
from edgellm.kernels.kv import BLOCK_TOKENS
from edgellm.kernels.program import Batch, Executor, HiddenExecutor

if TYPE_CHECKING:
    from edgellm.engine.disk_cache import DiskCache, Piece

LEAD = 16  # items computed ahead of the caller: it may take its tokens a few at a time
POLL_S = 0.05  # between two looks at what nobody announces: a cancel flag, a block that has become free
IDLE_S = 0.25  # a caller that took no item for so long may lose its blocks to a younger request
RUN_S = 0.025  # of decoding without Python: so long a newcomer waits, or a caller who gives up
PROMPT_TOKENS_BESIDE = 128  # of a prompt in a step, while others wait for their next token
LONE_STEP_S = 2.0  # of a step of a prompt that is alone and may be broken off: so much of its work is lost then
STEP_S = 0.12  # of a step that is waited for: by a newcomer, or for the blocks of a caller who has left
LONG_TOKENS = 512  # of whole texts in a step: with more it can be broken off, whose looks cost 0.2 ms
TOKEN_SHARE = 0.1  # of a step of one token, what one more in it costs at best: as long as that was not tried
LEAST_STEP_S = 1e-6  # what a step is said to take at least: it is divided by
LOOK = 4  # tokens of drafts, by which it is judged what one costs
LEAST_PROMPT_TOKENS = 64  # of a prompt in such a step: fewer are read at less than four fifths of the speed


Fail = Callable[[Request, BaseException], None]
"""Ends a request with an error; raises what is not that request's alone, such as a device that is gone."""


class Scheduled(NamedTuple):
    """What one request has in a step: its next tokens, the last of them drafts; for how many it wants logits."""

    request: Request
    sequence: cache.Sequence
    tokens: Sequence[int]
    n_outputs: int
    n_drafted: int = 0

    @property
    def decodes(self) -> bool:
        """Whether it is the next token of an answer, and drafts."""
        return self.n_outputs == 1 + self.n_drafted == len(self.tokens) and not self.request.hidden

    @property
    def catches_up(self) -> bool:
        """Whether it is the few tokens that an answer misses, of a draft that was rejected in part, say."""
        return self.n_outputs == 1 and len(self.tokens) <= MAX_DRAFT and self.request.draft_limit(1) > 0

    def without_draft(self) -> Scheduled:
        """Only what is known to be needed."""
        n = len(self.tokens) - self.n_drafted
        return self._replace(tokens=self.tokens[:n], n_outputs=self.n_outputs - self.n_drafted, n_drafted=0)


class Scheduler:
    """The requests in line. The engine's thread runs it; ``requests`` changes under the engine's lock."""

    def __init__(self, cache: KVCache, max_tokens: int) -> None:
        self.cache = cache
        self.max_tokens = max_tokens  # of one step
        self.disk: DiskCache | None = None
        self.snap: SnapKV | None = None
        self.source: DraftSource | None = None  # of the drafts of all requests, else each makes its own
        self._taps: tuple[HiddenExecutor, TapSource] | None = None  # where the source goes on from hidden states
        self.wake: Callable[[], None] = lambda: None  # the engine's thread, from others
        self.interactive = False  # callers come and leave at any time: a step is short, or can be broken off
        self.interruptible = False  # the executor can do so
        self.long: Request | None = None  # whose next step is to be broken off when another comes in, or it is left
        self.requests: list[Request] = []
        self._lacking: set[Request] = set()  # that wait for blocks, and for nothing else
        self.n_steps = self.n_parts = 0  # so far, and what requests had in them
        self.n_looks = 0  # within long steps, whether they are still wanted
        self._orders = count()
        self._step_s = float("inf")  # what the last step took
        self._decode_s: dict[int, float] = {}  # what a decode step of so many tokens takes, its drafts left out
        self._draft_s = self._read_s = 0.0  # what the drafts of the last step took, and of that reading other texts
        self._token_s = 0.0  # what a token of a prompt took in the last steps; 0 when there was none yet

    def add(self, request: Request) -> None:
        """The youngest from now on."""
        request.order = next(self._orders)
        self.requests.append(request)

    def settle(self, request: Request, *, keep: bool = True) -> None:
        """It will have no more steps: what the disk is to have of it is copied, which may take a while."""
        if request.trail is not None and request.sequence is not None:
            trail, request.trail = request.trail, None
            trail.end(request.sequence, keep)

    def remove(self, request: Request, *, keep: bool = True) -> None:
        """It is over; what it has computed stays findable unless not to be kept."""
        self.requests.remove(request)
        self.preempt(request, keep=keep)
        if self.source is not None and request.drafter is not None:
            self.source.release(request.drafter)

    def preempt(self, request: Request, *, keep: bool = True, wakes: bool = True) -> None:
        """Take its blocks; what is gone of them by its next step is computed again."""
        if request.trail is not None:
            request.trail.stop()
        if request.sequence is not None:
            self.cache.release(request.sequence, keep=keep)
            request.sequence = None
            if wakes:  # not for one that only looks again: those that lack blocks would go round for ever
                for waiting in self._lacking:
                    waiting.not_before = 0.0
                self._lacking.clear()

    def next_in_line(self) -> list[Request]:
        """The requests that may share the next step; none while all have to wait."""
        if not self.requests:
            self._decode_s.clear()  # the next ones may have other lengths, and the machine other things to do
        now = perf_counter()
        ready = [r for r in self.requests if len(r.mailbox) < LEAD and r.not_before <= now]
        turn = ready[:1]
        if ready and not ready[0].alone:
            turn = [r for r in ready if not r.alone and r.hidden == ready[0].hidden]
        if turn:
            sharing = set(turn)
            self.requests = [r for r in self.requests if r not in sharing] + turn
        return turn

    def schedule(self, requests: list[Request], fail: Fail) -> list[Scheduled]:
        """What each of the requests has in the next step, with blocks reserved; ``fail`` gets those that cannot be."""
        self.long, self._draft_s, self._read_s = None, 0.0, 0.0
        for request in [request for request in requests if request.sequence is None and not request.whole]:
            with _alone(request, fail):
                self._open(request)
        if self.disk is not None:
            requests = self._restored(requests, fail)
        requests = [request for request in requests if request.whole or request.sequence is not None]
        if len(requests) > 1:  # one whose text is known up to the tokens that choose has a step of its own, later
            requests = [request for request in requests if not request.alone] or requests[:1]
        budgets = list(self._budgets(requests))
        for request in set(requests) - {request for request, _ in budgets}:
            if request.sequence is not None and request.n_computed == request.sequence.n_reused:
                self.preempt(request, wakes=False)  # look again next time: there may be more to find
        scheduled = []
        for request, budget in budgets:
            if request.whole:  # nothing of it is kept
                request.turn = next(self._orders)
                self.preempt(request, keep=False)
                request.sequence = self.cache.open(request.tokens, shared=False)
            sequence = request.sequence
            if sequence is None:  # an older one has just taken its blocks
                continue
            with _alone(request, fail):
                tokens, n_outputs = request.next_tokens(min(budget, self.cache.room(sequence), request.room))
                if self._reserve(request, len(tokens)):
                    scheduled.append(Scheduled(request, sequence, tokens, n_outputs))
                else:
                    request.not_before = perf_counter() + POLL_S
                    self._lacking.add(request)
        scheduled = _still(scheduled)
        return _still(self._with_drafts(scheduled, fail)) if scheduled else []

    def _open(self, request: Request) -> None:
        known = request.tokens[: request.window_start + 1] if request.choice_end else request.tokens
        request.sequence = self.cache.open(known, shared=request.shared, variant=request.variant)
        if self.disk is not None and request.shared:
            self._look_up(self.disk, request, request.sequence)

    # -- what is on the disk ---------------------------------------------------------------------------------------

    def _look_up(self, disk: DiskCache, request: Request, sequence: cache.Sequence) -> None:
        if request.trail is None:
            request.trail = disk.follow(request.tokens, request.variant)

        def wake() -> None:
            request.not_before = 0.0
            self.wake()

        if not request.trail.look_up(sequence, wake):
            self.preempt(request)
            request.not_before = perf_counter() + POLL_S

    def _restored(self, requests: list[Request], fail: Fail) -> list[Request]:
        """Those for which nothing more is being read; a piece that has been read goes into the cache, one a step."""
        room, there = 1, []
        for request in requests:
            if (trail := request.trail) is None or (reading := trail.reading) is None:
                if request.whole or request.sequence is not None:
                    there.append(request)
                continue
            request.not_before = perf_counter() + POLL_S  # before the look: a wake that comes now counts
            if (piece := trail.take()) is None:
                if reading.over or reading.hangs:
                    trail.stop()
                    request.not_before = 0.0
                    there.append(request)
            elif not room:
                request.not_before = 0.0
            else:
                with _alone(request, fail):
                    if self._take_over(request, piece):
                        request.not_before, room = 0.0, 0
        return there

    def _take_over(self, request: Request, piece: Piece) -> bool:
        """Put a piece into the cache; False while older requests hold the blocks. Without any the rest is computed."""
        sequence, trail = request.sequence, request.trail
        assert sequence is not None and trail is not None, "a piece without a place for it"
        try:
            if not self._reserve(request, piece.end - sequence.length):
                return False
        except ContextFullError:
            trail.stop()
            return True
        tokens = request.tokens[sequence.length : piece.end]
        self.cache.take_over(sequence, tokens, partial(piece.fill, self.cache.pool))
        trail.taken()
        return True

    def keep(self, part: Scheduled) -> BaseException | None:
        """A step of it was committed: what is new goes to the disk; an error, where what is to stay has no room."""
        if part.request.trail is not None:
            part.request.trail.keep(part.sequence)
        watch, part.request.watch = part.request.watch, None
        if watch is not None and self.snap is not None:
            try:
                self.snap.keep(self.cache, part.sequence, watch, partial(self._make_room, part.request))
            except ContextFullError as error:
                return error
        return None

    # -- which keys of a prompt stay -------------------------------------------------------------------------------

    def choice_end(self, n_prompt: int) -> int:
        """Where the keys of a prompt of so many tokens are chosen, 0 for nowhere."""
        return self.snap.end(n_prompt) if self.snap is not None else 0

    def watch(self, part: Scheduled, executor: Executor) -> Watch | None:
        """A hook that sees what the choice is made by, where this is that step."""
        if self.snap is None or not part.request.chooses:
            return None
        part.request.watch = Watch(executor, part.sequence, part.request.hook)
        return part.request.watch

    def _make_room(self, request: Request) -> bool:
        """Preempt the youngest of the others; False where there is none."""
        if others := self._holders(request):
            self.preempt(max(others, key=lambda r: r.order))
        return bool(others)

    def _holders(self, request: Request) -> list[Request]:
        """The others that hold blocks."""
        return [r for r in self.requests if r is not request and r.sequence is not None]

    # -- how much of each ------------------------------------------------------------------------------------------

    def _budgets(self, requests: Sequence[Request]) -> Iterator[tuple[Request, int]]:
        """The requests that take part in the next step, and how many tokens each may have.

        Those that miss few tokens come first: an answer's next one, or what a draft has cost. Then prompts in turn; one
        that is short beside the oldest need not wait for it, and leaves it half of what there is. A prompt that goes on
        as another one in this step does, as far or further on, waits: soon it finds the other's blocks.
        """
        room = self.max_tokens
        if requests and requests[0].whole:
            yield from self._whole_texts(requests)
            return
        prompts = []
        for request in requests:
            if request.n_missing > 1 + MAX_DRAFT:
                prompts.append(request)
            elif room > 0:
                yield request, room
                room -= min(room, request.n_missing)
        n_answers = self.max_tokens - room
        room = min(room, max(LEAST_PROMPT_TOKENS, self._timely_tokens() - n_answers))
        if n_answers:
            room = min(room, PROMPT_TOKENS_BESIDE)
        short = _short_ones(prompts)
        kept = (room + 1) // 2 if short else 0  # for the others
        leaders: list[Request] = []
        for request in [*short, *(one for one in prompts if one not in short)]:
            share = room - kept if request in short else room
            if share > 0:
                if any(_follows(request, leader) for leader in leaders):
                    continue
                leaders.append(request)
                yield request, share
                room -= min(share, request.n_missing)

    def _whole_texts(self, requests: Sequence[Request]) -> Iterator[tuple[Request, int]]:
        """The one that has waited longest for a step, and of the others those that fit beside it, the older first."""
        # those of one caller are many: without others they need not be quick
        room = max(LEAST_PROMPT_TOKENS, self._timely_tokens()) if self.interactive else self.max_tokens
        for i, request in enumerate(sorted(requests, key=lambda request: request.turn or request.order)):
            if i == 0 or request.n_missing <= room:
                yield request, request.n_missing
                room -= request.n_missing

    def _timely_tokens(self) -> int:
        """How many tokens a step may have that reads prompts."""
        seconds, lone = STEP_S, self.requests[0] if len(self.requests) == 1 else None
        if lone is not None and not self.interactive:
            return self.max_tokens
        if lone is not None and self.interruptible and not lone.gave_way and lone.n_missing > 1 and lone.hook is None:
            seconds, self.long = LONE_STEP_S, lone
        n = int(seconds / self._token_s) if self._token_s else PROMPT_TOKENS_BESIDE
        return min(self.max_tokens, n // BLOCK_TOKENS * BLOCK_TOKENS)

    def _reserve(self, request: Request, n: int) -> bool:
        """Blocks for n tokens, if need be by preempting; False while older requests hold them."""
        assert request.sequence is not None
        while True:
            try:
                self.cache.reserve(request.sequence, n)
                return True
            except ContextFullError:
                if not (others := self._holders(request)):
                    raise
                idle = perf_counter() - IDLE_S
                victims = [r for r in others if r.order > request.order or 0 < r.idle_since < idle]
                if not victims:
                    return False
                self.preempt(max(victims, key=lambda r: r.order))

    # -- several tokens of an answer at once -----------------------------------------------------------------------

    def _with_drafts(self, scheduled: list[Scheduled], fail: Fail) -> list[Scheduled]:
        """The same with drafts, where all are answers and it is known what they cost without."""
        n_plain = len(scheduled)
        if n_plain not in self._decode_s or not all(part.decodes or part.catches_up for part in scheduled):
            return scheduled
        n_known = sum(len(part.tokens) for part in scheduled)
        began, most = perf_counter(), min(MAX_DRAFT, max(0, self.max_tokens - n_known) // n_plain)
        drafts = self._drafts(scheduled, most, fail)
        self._draft_s, self._read_s = perf_counter() - began, sum(draft.read_s for draft in drafts)
        for part, draft in zip(scheduled, drafts, strict=True):
            if draft.read_s:
                _charge(part.request, draft.read_s / self._decode_s[n_plain])
        if not any(draft.tokens or draft.tried for draft in drafts):
            return scheduled
        longest = min(most, max(len(draft.tokens) for draft in drafts))
        n = max(range(longest, -1, -1), key=lambda n: self._worth(n_plain, n_known, drafts, n))
        parts = [self._with_draft(part, draft.tokens[:n]) for part, draft in zip(scheduled, drafts, strict=True)]
        n_tried = sum(draft.tried for draft in drafts)
        for part, draft in zip(parts, drafts, strict=True):
            if draft.tried and not part.n_drafted:
                _settle(part.request, (self._read_s - self._draft_s) / self._decode_s[n_plain] / n_tried)
        return parts

    def _drafts(self, scheduled: Sequence[Scheduled], most: int, fail: Fail) -> list[Draft]:
        """At most ``most`` tokens for each."""
        rooms = [min(most, min(self._room(part), 1 + MAX_DRAFT) - len(part.tokens)) for part in scheduled]
        made = [Draft() for _ in scheduled]
        if self.source is not None:
            limits = [part.request.draft_limit(room) for part, room in zip(scheduled, rooms, strict=True)]
            asked = {
                i: Ask(part.request.drafter, part.request.tokens, n)
                for i, (part, n) in enumerate(zip(scheduled, limits, strict=True))
                if n > 0 and part.request.drafter is not None
            }
            n, plain_s = len(scheduled), self._decode_s[len(scheduled)]
            row_s = max(0.0, (n + LOOK) / self._tokens_per_s(n + LOOK) - n / self._tokens_per_s(n)) / LOOK
            found = self.source.draft_all(list(asked.values()), plain_s, row_s) if asked else []
            for i, draft in zip(asked, found, strict=True):
                made[i] = draft
        for i, part in enumerate(scheduled):
            with _alone(part.request, fail):
                if self.source is None:
                    made[i] = Draft.sure(part.request.draft(rooms[i]))
                elif made[i].tokens:
                    made[i] = made[i]._replace(tokens=part.request.allowed(made[i].tokens))
        return made

    def _worth(self, n_plain: int, n_known: int, drafts: Sequence[Draft], n: int) -> float:
        """Tokens a second that a step with n tokens of each draft will likely make."""
        sizes = [min(n, len(draft.tokens)) for draft in drafts]
        size = n_known + sum(sizes)
        right = sum(sum(draft.chances[:k]) for draft, k in zip(drafts, sizes, strict=True))
        return self._tokens_per_s(size) * (n_plain + right) / size

    def _room(self, part: Scheduled) -> int:
        """Tokens that an answer may have at once: its caller shall not fall behind, the cache may want a snapshot."""
        return min(LEAD - len(part.request.mailbox), self.cache.room(part.sequence))

    def _tokens_per_s(self, n: int) -> float:
        """Of a decode step of n tokens; of a size that was not tried yet, as the nearest two let expect."""
        known = max(size for size in self._decode_s if size <= n)
        seconds = self._decode_s[known]
        more = min((size for size in self._decode_s if size > n), default=0)
        a_token = (self._decode_s[more] - seconds) / (more - known) if more else TOKEN_SHARE * seconds / known
        return n / (seconds + (n - known) * max(0.0, a_token))

    def _with_draft(self, part: Scheduled, draft: Sequence[int]) -> Scheduled:
        with contextlib.suppress(ContextFullError):  # nobody is preempted for a guess
            if draft:
                self.cache.reserve(part.sequence, len(part.tokens) + len(draft))
                return part._replace(tokens=[*part.tokens, *draft], n_outputs=1 + len(draft), n_drafted=len(draft))
        return part

    def tap_into(self, executor: Executor) -> None:
        """Where the source of drafts goes on from hidden states, it gets those of this executor's steps."""
        self._taps = None
        if isinstance(executor, HiddenExecutor) and isinstance(self.source, TapSource):
            executor.keeps_hidden = not self.source.of_tokens
            self._taps = executor, self.source

    def is_tapped(self, part: Scheduled) -> bool:
        """Whether the source wants hidden states of this part, of which a run without Python leaves the last alone."""
        drafter = part.request.drafter
        return self._taps is not None and drafter is not None and self._taps[1].wants(drafter, part.request.tokens)

    def tap(self, scheduled: Sequence[Scheduled]) -> None:
        """Give the source the hidden states of a step."""
        if self._taps is None or scheduled[0].request.hidden:
            return
        wanted = [self.is_tapped(part) for part in scheduled]
        if not any(wanted):
            return
        (executor, source), end = self._taps, 0
        rows = executor.last_tapped() if source.of_tokens else executor.last_hidden()
        for part, is_wanted in zip(scheduled, wanted, strict=True):
            n = len(part.tokens) if source.of_tokens else part.n_outputs
            mine, end = rows[end : end + n], end + n
            if is_wanted and part.request.drafter is not None:
                source.see(part.request.drafter, part.sequence.length + len(part.tokens) - n, mine)

    def run_length(self, part: Scheduled, n_together: int = 1) -> int:
        """Steps that an answer may take without Python between them, blocks for them reserved; 0 where it may not.

        They end before a newcomer has waited for long. ``n_together`` answers have a token in each.
        """
        if not part.decodes or part.n_drafted or self.is_tapped(part):
            return 0
        step_s = self._decode_s.get(n_together, self._step_s)  # the last one may have had a draft
        n = min(int(RUN_S / step_s), self._room(part), part.request.n_wanted)
        with contextlib.suppress(ContextFullError):  # nobody is preempted for steps that can wait
            if n > 1:
                self.cache.reserve(part.sequence, n)
                return n
        return 0

    def drop_drafts(self) -> None:
        """The step is made anew without its drafts, and what they took is no part of it."""
        self._draft_s = self._read_s = 0.0

    def note(
        self,
        scheduled: Sequence[Scheduled],
        kept: Sequence[int],
        seconds: float,
        n_steps: int = 1,
        replay_s: float = 0.0,
    ) -> None:
        """A step is over, or a run of some: what it took, drafts included, and how many tokens of each the cache kept.

        The time that drafts have cost, in tokens that plain steps would have made in it, is set against those won.

        replay_s   what it took besides to take tokens back
        """
        self._step_s, n = seconds / n_steps, len(scheduled)
        self.n_steps += 1
        self.n_parts += n
        n_tokens = sum(len(part.tokens) for part in scheduled)
        if not all(part.decodes or part.n_drafted for part in scheduled):
            if n_tokens >= min(LEAST_PROMPT_TOKENS, self.max_tokens):
                self._token_s = (seconds / n_tokens + (self._token_s or seconds / n_tokens)) / 2
            return
        n_drafted = sum(part.n_drafted for part in scheduled)
        step_s, self._draft_s = max(LEAST_STEP_S, (seconds - self._draft_s) / n_steps), 0.0
        known = self._decode_s.get(n_tokens, step_s)
        self._decode_s[n_tokens] = min(step_s, 0.75 * known + 0.25 * step_s)
        for part, n_kept in zip(scheduled, kept, strict=True):
            if part.n_drafted:
                cost = n * ((seconds + replay_s - self._read_s) / self._decode_s[n] - 1) * part.n_drafted / n_drafted
                _settle(part.request, n_kept - 1 - cost)


def _settle(request: Request, gain: float) -> None:
    """Tell its drafter what a draft has brought, in tokens."""
    if request.drafter is not None:
        request.gained += gain
        request.drafter.settle(gain)


def _charge(request: Request, cost: float) -> None:
    """Tell its drafter what reading its text has cost, in tokens."""
    if request.drafter is not None:
        request.gained -= cost
        request.drafter.charge(cost)


@contextlib.contextmanager
def _alone(request: Request, fail: Fail) -> Iterator[None]:
    """What goes wrong in it is the affair of this request, and no other's."""
    try:
        yield
    except BaseException as error:
        fail(request, error)


def _still(scheduled: Sequence[Scheduled]) -> list[Scheduled]:
    """Those whose blocks nobody has taken meanwhile."""
    return [part for part in scheduled if part.request.sequence is part.sequence]


def _follows(request: Request, leader: Request) -> bool:
    """Whether the next block of ``leader`` is one of this prompt, too, which is not past it."""
    end = leader.n_computed + BLOCK_TOKENS
    alike = request.shared and leader.shared and request.variant == leader.variant
    if not alike or request.n_computed > leader.n_computed or len(leader.tokens) < end:
        return False
    return request.tokens[:end] == leader.tokens[:end]


def _short_ones(prompts: Sequence[Request]) -> list[Request]:
    """Those that miss at most half as much as the oldest, the shortest first."""
    if len(prompts) < 2:
        return []
    oldest = min(prompts, key=lambda request: request.order)
    short = [request for request in prompts if 2 * request.n_missing <= oldest.n_missing]
    return sorted(short, key=lambda request: request.n_missing)


def make_batch(scheduled: Sequence[Scheduled]) -> Batch:
    """All of a step as one batch, each request a sequence of its own."""
    if len(scheduled) == 1:  # every core waits for the next token: few calls into numpy
        return _batch_of_one(scheduled[0])
    counts = [len(part.tokens) for part in scheduled]
    outputs = np.zeros(sum(counts), bool)
    for end, part in zip(np.cumsum(counts), scheduled, strict=True):
        _want(part, outputs[end - len(part.tokens) : end])
    starts = [part.sequence.n_held for part in scheduled]
    positions = np.concatenate([np.arange(p, p + n, dtype=np.int32) for p, n in zip(starts, counts, strict=True)])
    dropped = [part.sequence.dropped for part in scheduled]
    return Batch(
        tokens=np.concatenate([np.array(part.tokens, np.int32) for part in scheduled]),
        positions=positions,
        sequences=np.repeat(np.arange(len(scheduled), dtype=np.int32), counts),
        outputs=outputs,
        tables=tuple(np.stack(tables) for tables in zip(*(part.sequence.tables for part in scheduled), strict=True)),
        rope_positions=positions + np.repeat(np.array(dropped, np.int32), counts) if any(dropped) else None,
        types=_types(scheduled),
        hidden=scheduled[0].request.hidden,
        adapters=_adapters(scheduled, counts),
    )


def _want(part: Scheduled, outputs: np.ndarray) -> None:
    """Mark the rows of its tokens that want logits."""
    rows = part.request.output_rows
    outputs[slice(len(outputs) - part.n_outputs, None) if rows is None else rows] = True


def _adapters(scheduled: Sequence[Scheduled], counts: Sequence[int]) -> np.ndarray | None:
    """The scale of every adapter for every token, where a request has one."""
    values = [() if part.request.adapters is None else part.request.adapters.values for part in scheduled]
    width = max(map(len, values))
    if not width:
        return None
    return np.repeat(np.array([one or (0.0,) * width for one in values], np.float32), counts, axis=0)


def _types(scheduled: Sequence[Scheduled]) -> np.ndarray | None:
    """Of every token, where one of the texts is a pair."""
    if all(part.request.types is None for part in scheduled):
        return None
    types = [np.zeros(len(part.tokens)) if part.request.types is None else part.request.types for part in scheduled]
    return np.concatenate(types).astype(np.int32)


def _batch_of_one(part: Scheduled) -> Batch:
    n, start, dropped = len(part.tokens), part.sequence.n_held, part.sequence.dropped
    outputs = np.zeros(n, bool)
    _want(part, outputs)
    positions = np.arange(start, start + n, dtype=np.int32)
    tables = tuple(table[None] for table in part.sequence.tables)
    tokens, sequences = np.array(part.tokens, np.int32), np.zeros(n, np.int32)
    adapters = _adapters([part], [n])
    if not part.request.hidden:
        turning = positions + np.int32(dropped) if dropped else None
        return Batch(tokens, positions, sequences, outputs, tables, rope_positions=turning, adapters=adapters)
    return Batch(tokens, positions, sequences, outputs, tables, types=_types([part]), hidden=True, adapters=adapters)
