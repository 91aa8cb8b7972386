"""Prices and discounts."""

PRICES = {"apple": 0.4, "bread": 2.5, "cheese": 7.25}


def price_of(name: str) -> float:
    """The price of one piece."""
    try:
        return PRICES[name]
    except KeyError:
        raise LookupError(f"no price for {name!r}") from None


def discount(amount: float, share: float) -> float:
    """What is taken off an amount."""
    return max(0.0, amount * share)
