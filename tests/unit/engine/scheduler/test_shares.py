"""Tests of QueueShares: one tenant may fill a queue that it has for itself, and a flood leaves room for everybody else."""

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.shares import SHARE, Held, QueueShares

NOTHING = Held(0, 0)


class Queue:
    """A queue that admits what `shares` allows. All its requests have `tokens` tokens."""

    def __init__(self, most: int, most_tokens: int = 1 << 40, tokens: int = 1):
        self.shares, self.tokens = QueueShares(most, most_tokens), tokens
        self.held: dict[str, int] = {}

    def offer(self, tenant: str) -> bool:
        total, own = sum(self.held.values()), self.held.get(tenant, 0)
        waiting, mine = (Held(num, num * self.tokens) for num in (total, own))
        self.shares.note(tenant)
        if self.shares.refusal(self.tokens, waiting, mine) is not None:
            return False
        self.held[tenant] = own + 1
        return True

    def flood(self, tenant: str) -> int:
        while self.offer(tenant):
            pass
        return self.held[tenant]


def test_the_only_tenant_fills_the_queue():
    assert Queue(100).flood("a") == 100
    assert Queue(100, most_tokens=90, tokens=3).flood("a") == 30


def test_a_flood_leaves_a_ninth_to_others_once_there_were_any():
    queue = Queue(900)
    queue.offer("calm")
    queue.held.clear()
    assert queue.flood("flood") == 800
    assert queue.offer("calm")


def test_the_tokens_of_a_flood_leave_room_too():
    queue = Queue(1 << 20, most_tokens=9000, tokens=10)
    queue.offer("calm")
    queue.held.clear()
    assert queue.flood("flood") == 800
    assert queue.offer("calm")


def test_a_tenant_that_filled_the_queue_alone_gets_no_place_before_the_first_of_another():
    queue = Queue(90)
    queue.flood("flood")
    assert not queue.offer("calm")
    queue.held["flood"] -= 1
    assert not queue.offer("flood")
    assert queue.offer("calm")


def test_two_floods_end_with_equal_parts():
    queue = Queue(1700)
    queue.offer("b")
    queue.held.clear()
    queue.flood("a")
    for _ in range(3000):  # each request that starts makes room, and both tenants offer more than that
        starting = max(queue.held, key=queue.held.__getitem__) if len(queue.held) > 1 else "a"
        queue.held[starting] -= 1
        queue.offer("b")
        queue.offer("a")
    assert abs(queue.held["a"] - queue.held["b"]) < 0.1 * 1700
    assert sum(queue.held.values()) <= 1700


def test_a_long_prompt_waits_where_nothing_else_waits():
    shares = QueueShares(10, 100)
    assert shares.refusal(1000, NOTHING, NOTHING) is None
    assert shares.refusal(101, Held(1, 10), NOTHING) == "1 requests with 10 tokens are already waiting"


def test_a_refusal_says_whose_requests_wait():
    shares = QueueShares(18, 100)
    assert shares.refusal(1, Held(16, 16), Held(16, 16)) is None
    shares.note("flood")
    shares.note("calm")
    assert "16 requests with 16 tokens of this tenant" in shares.refusal(1, Held(16, 16), Held(16, 16))


@given(
    offers=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=300),
    most=st.integers(1, 40),
    most_tokens=st.integers(1, 200),
    tokens=st.integers(1, 30),
)
def test_bounds_hold_and_no_tenant_is_refused_while_it_holds_nothing_and_a_ninth_is_free(offers, most, most_tokens, tokens):
    queue = Queue(most, most_tokens, tokens)
    for tenant, starts in offers:
        if starts and queue.held.get(tenant):
            queue.held[tenant] -= 1
            continue
        own, total = queue.held.get(tenant, 0), sum(queue.held.values())
        room = total < most and (total + 1) * tokens <= most_tokens
        accepted = queue.offer(tenant)
        assert accepted <= (room or total == 0)
        if room and not own:
            assert accepted
        if accepted and total and len(queue.held) > 1:
            assert own < SHARE * (most - total)
    assert sum(queue.held.values()) <= most
