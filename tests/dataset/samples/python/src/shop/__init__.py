"""A small shop: prices, a basket, and its report."""

from .basket import Basket

__all__ = ["Basket"]
