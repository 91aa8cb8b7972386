#include <iostream>

#include <geo/shape.hpp>
#include "total.h"

int main() {
    std::vector<std::unique_ptr<geo::Shape>> shapes;
    for (int side = 1; side < 4; ++side) {
        shapes.push_back(geo::make_square(side));
    }
    std::cout << total_area(shapes) << "\n";
}
