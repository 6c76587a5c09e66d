"""The search for a learning rate, which is the same for all methods of all tables."""

from collections.abc import Callable, Mapping, Sequence


def searched(
    scores: Callable[[Sequence[float]], Mapping[float, float]],
    rates: Sequence[float],
    wider: int,
    begins: Callable[[], None] = lambda: None,
) -> dict[float, float]:
    """Scores of learning rates, with further ones while the best is the last in order.

    Args:
      scores: from rates to their scores on validation data; the highest is best.
      rates: to begin with.
      wider: how many further rates may be tried, one after the other.
      begins: told of each further one before it is tried.

    Returns:
      The scores of all rates that were tried.

    Example:
      >>> searched(lambda rates: {rate: -abs(rate - 8) for rate in rates}, (1, 2, 4), 5)
      {1: -7, 2: -6, 4: -4, 8.0: 0.0, 16.0: -8.0}
    """
    found = dict(scores(rates))
    for _ in range(wider):
        if (rate := beyond(found)) is None:
            break
        begins()
        found |= scores([rate])
    return found


def each(
    score: Callable[[float], float],
) -> Callable[[Sequence[float]], dict[float, float]]:
    """Scores of several rates, by a function of one.

    Example:
      >>> each(abs)([-1.0, 2.0])
      {-1.0: 1.0, 2.0: 2.0}
    """
    return lambda rates: {rate: score(rate) for rate in rates}


def best(tuned: Mapping[float, float]) -> float:
    """The best learning rate; of equal ones the first tried."""
    return max(tuned, key=lambda rate: tuned[rate])


def beyond(tuned: Mapping[float, float]) -> float | None:
    """The next learning rate in geometric order if the best is the last, or None."""
    rates = sorted(tuned)
    if len(rates) > 1 and best(tuned) in (rates[0], rates[-1]):
        end, inner = rates[:2] if best(tuned) == rates[0] else rates[:-3:-1]
        return float(f"{end * end / inner:.2g}")
    return None
