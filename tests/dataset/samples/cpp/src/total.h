#include "../include/geo/shape.hpp"

#include <vector>

template <typename Items>
double total_area(const Items &items) {
    double total = 0;
    for (const auto &item : items) {
        total += item->area();
    }
    return total;
}
