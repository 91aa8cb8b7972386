#include "geo/shape.hpp"

#include <stdexcept>

namespace geo {

class Square : public Shape {
public:
    explicit Square(double side) : side_(side) {
        if (side < 0) {
            throw std::invalid_argument("a side is not negative");
        }
    }

    double area() const override { return side_ * side_; }

private:
    double side_;
};

std::unique_ptr<Shape> make_square(double side) {
    auto made = std::make_unique<Square>(side);
    return made;
}

}  // namespace geo
