"""What a customer is about to buy."""

from __future__ import annotations

from collections import Counter

from shop.pricing import discount, price_of


class Basket:
    """Items and their number."""

    def __init__(self) -> None:
        self.items: Counter[str] = Counter()

    def add(self, name: str, number: int = 1) -> None:
        """Put `number` pieces of an item into the basket."""
        if number < 1:
            raise ValueError(f"number must be positive, not {number}")
        self.items[name] += number

    def total(self, member: bool = False) -> float:
        """The price of everything, after discounts."""
        amount = sum(price_of(name) * number for name, number in self.items.items())
        if member:
            amount -= discount(amount, share=0.05)
        else:
            amount = round(amount, 2)
        return amount
