"""Resets the KV caches of all engines of a server, and adds up their answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence

from engine.errors import EngineUnavailable
from engine.messages import TierName
from server.engines.link import EngineLink


async def reset_caches(links: Sequence[EngineLink], tiers: Collection[TierName], timeout_s: float) -> dict[TierName, int]:
    """Make the engines of `links` forget the blocks that `tiers` have of prefixes. Returns how many blocks each tier had.

    Raises EngineUnavailable, naming the engine, if one is not ready, in which case no engine is asked, or if one is lost or does
    not answer within `timeout_s` seconds. The other engines have then reset their caches.
    """
    for index, link in enumerate(links):
        why = link.why_not_ready()
        if why is not None:
            raise EngineUnavailable(f"engine {index} is not ready ({why}): no cache was reset, try again later")
    asked = [_reset(index, link, tiers, timeout_s) for index, link in enumerate(links)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    total = Counter(dict.fromkeys(tiers, 0))
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        total.update(answer)
    return dict(total)


async def _reset(index: int, link: EngineLink, tiers: Collection[TierName], timeout_s: float) -> dict[TierName, int]:
    try:
        return await asyncio.wait_for(link.reset_cache(tiers), timeout_s)
    except TimeoutError:
        why = f"did not answer within {timeout_s:g} s"
    except ConnectionError as error:
        why = str(error)
    raise EngineUnavailable(f"engine {index} {why}: its cache may not be reset, try again later")
