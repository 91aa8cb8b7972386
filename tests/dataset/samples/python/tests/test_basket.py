import pytest
from shop import Basket


def test_total_is_the_sum_of_prices():
    basket = Basket()
    basket.add("apple", 2)
    assert basket.total() == pytest.approx(0.8)
