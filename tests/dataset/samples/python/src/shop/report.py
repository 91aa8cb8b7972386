"""Text for a receipt."""

from . import pricing
from .basket import Basket


def receipt(basket: Basket) -> str:
    """One line per item, and the total."""
    lines = []
    for name, number in sorted(basket.items.items()):
        lines.append(f"{number:3} {name:<10} {pricing.price_of(name) * number:8.2f}")
    lines.append(f"total {basket.total():21.2f}")
    return "\n".join(lines)
