"""Tests what a conversation counts and lists of a client's values."""

from server.text.conversation import Conversation, strings_in

MANY = 1_000_000


def test_the_weight_counts_texts_and_values():
    small = Conversation(messages=[{"role": "user", "content": "x"}])
    assert small.weight(10_000) < Conversation(messages=[*small.messages] * 2).weight(10_000)
    long = Conversation(messages=[{"role": "user", "content": "x" * 5000}])
    assert long.weight(10_000) - small.weight(10_000) == 4999
    for more in ({"variables": {"a": ["x" * 500]}}, {"documents": [{"text": "x" * 500}]}):
        assert Conversation(messages=small.messages, **more).weight(10_000) > small.weight(10_000) + 500


def test_counting_the_weight_ends_above_the_largest_weight_of_interest():
    class Counting(list):
        seen = 0

        def __iter__(self):
            for item in super().__iter__():
                self.seen += 1
                yield item

    for value in ([], "x"):
        values = Counting([value] * MANY)
        assert Conversation(messages=[], variables={"a": values}).weight(10_000) > 10_000
        assert values.seen < 1000


def test_all_strings_of_a_value_are_found_at_any_depth():
    deep = value = []
    for _ in range(100_000):
        deep.append([])
        deep = deep[0]
    deep.append({"a": ["b", 1, None, {"c": "d"}]})
    assert list(strings_in(value)) == ["a", "b", "c", "d"]
