// Normally distributed floats, the same ones for each seed.
#pragma once

#include <cstddef>
#include <random>
#include <vector>

namespace flashclient {

inline std::vector<float> random_floats(size_t count, unsigned seed, float deviation = 1.0f) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, deviation);
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
}

}  // namespace flashclient
