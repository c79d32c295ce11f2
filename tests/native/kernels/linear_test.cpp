// Products and predictions from several threads, over rows at the end of their allocation: what the sanitizers watch.
#include "kernels/linear.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <thread>
#include <utility>
#include <vector>

#include "instruction_set.h"
#include "kernels/predictor.h"
#include "random_floats.h"

namespace flashclient {
namespace {

class LinearBits : public OfInstructionSet {
  protected:
    static constexpr size_t COLUMNS = 77;
    static constexpr size_t ROWS = 1301;

    std::vector<float> product(size_t threads, size_t tokens) {
        Workers workers(threads);
        std::vector<float> y(tokens * ROWS, -1.0f);
        Linear(workers, Dtype::f32, GetParam()).multiply({weight_.data(), ROWS, COLUMNS}, x_.data(), tokens, y.data());
        return y;
    }

    std::vector<float> weight_ = random_floats(ROWS * COLUMNS, 1);
    std::vector<float> x_ = random_floats(40 * COLUMNS, 2);
};

TEST_P(LinearBits, DoNotDependOnThreadsOrTokens) {
    const std::vector<float> all = product(1, 40);
    EXPECT_EQ(product(4, 40), all);
    for (const size_t tokens : {1, 2, 5, 11, 17}) {
        const std::vector<float> some = product(3, tokens);
        EXPECT_TRUE(std::equal(some.begin(), some.end(), all.begin()));
    }
}

class LinearBitsOf16 : public LinearBits {
  protected:
    void check(size_t exact, size_t of);
};

TEST_P(LinearBitsOf16, RowsDoNotDependOnTheOthersAndAreSummedInFp32) {
    check(1, 3);  // side by side
    check(1, 1);  // groups of tokens are multiplied together
}

// `exact` of so many rows of x have numbers that bf16 holds; those of the others need all bits of fp32.
void LinearBitsOf16::check(size_t exact, size_t of) {
    std::vector<float> x = x_;
    for (size_t i = 0; i < x.size(); i++) {
        if (i / COLUMNS % of < exact) x[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(x[i]) & 0xffff0000U);
    }
    for (const Dtype dtype : {Dtype::bf16, Dtype::f16}) {
        std::vector<uint16_t> weight(weight_.size());
        std::vector<float> wide(weight_.size());
        kernels_for(dtype, GetParam()).downcast(weight_.data(), weight_.size(), weight.data());
        kernels_for(dtype, GetParam()).upcast(weight.data(), weight.size(), wide.data());
        const auto multiply = [&](size_t threads, size_t first, size_t tokens) {
            Workers workers(threads);
            std::vector<float> y(tokens * ROWS);
            const Linear linear(workers, dtype, GetParam());
            linear.multiply({weight.data(), ROWS, COLUMNS}, x.data() + first * COLUMNS, tokens, y.data());
            return y;
        };
        const std::vector<float> all = multiply(4, 0, 40);
        for (const auto& [first, tokens] : std::vector<std::pair<size_t, size_t>>{{0, 1}, {1, 1}, {3, 6}, {7, 33}}) {
            const std::vector<float> some = multiply(1, first, tokens);
            EXPECT_TRUE(std::equal(some.begin(), some.end(), all.begin() + static_cast<ptrdiff_t>(first * ROWS)));
        }
        for (size_t i = 0; i < all.size(); i++) {
            double dot = 0.0, size = 0.0;
            for (size_t j = 0; j < COLUMNS; j++) {
                const double product =
                    static_cast<double>(x[i / ROWS * COLUMNS + j]) * static_cast<double>(wide[i % ROWS * COLUMNS + j]);
                dot += product;
                size += std::abs(product);
            }
            ASSERT_NEAR(all[i], dot, 4e-7 * size);
        }
    }
}

TEST_P(LinearBits, RowsTimesBlocksHaveTheSameBitsInAnyNumber) {
    Workers workers(2);
    constexpr size_t ROWS_HERE = 37, COLUMNS_HERE = 2048, TOKENS = 23;
    const std::vector<float> x = random_floats(TOKENS * COLUMNS_HERE, 3);
    const Linear linear(workers, Dtype::f32, GetParam());
    for (size_t format = 0; format < std::size(weightd::BLOCK_FORMATS); format++) {
        const auto& [name, values, bytes] = weightd::BLOCK_FORMATS[format];
        std::vector<uint8_t> weight(ROWS_HERE * COLUMNS_HERE / values * bytes);
        const uint8_t least = static_cast<BlockFormat>(format) == BlockFormat::mxfp4 ? 0x74 : 0x24;  // usual scales
        for (size_t i = 0; i < weight.size(); i++) weight[i] = static_cast<uint8_t>(least + i * i % 7 % 4);
        const auto multiply = [&](size_t first, size_t tokens) {
            std::vector<float> y(tokens * ROWS_HERE);
            const Matrix matrix{weight.data(), ROWS_HERE, COLUMNS_HERE, static_cast<BlockFormat>(format)};
            linear.multiply(matrix, x.data() + first * COLUMNS_HERE, tokens, y.data());
            return y;
        };
        const std::vector<float> all = multiply(0, TOKENS);
        for (const auto& [first, tokens] : std::vector<std::pair<size_t, size_t>>{{4, 1}, {1, 2}, {5, 6}, {9, 7}}) {
            const std::vector<float> some = multiply(first, tokens);
            EXPECT_TRUE(std::equal(some.begin(), some.end(), all.begin() + static_cast<ptrdiff_t>(first * ROWS_HERE)))
                << name << " " << tokens;
        }
    }
}

// Rows so long that parts of them are computed while others are fetched, and that sums are kept between stretches.
TEST_P(LinearBits, LongRowsHaveTheSameBitsInAnyNumber) {
    Workers workers(1);
    constexpr size_t LONG = 2085, TOKENS = 17;
    std::vector<float> x = random_floats(TOKENS * LONG, 5);
    for (size_t i = 0; i < 12 * LONG; i++) x[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(x[i]) & 0xffff0000U);
    const Linear linear(workers, Dtype::bf16, GetParam());
    for (const size_t rows : {1, 5, 40}) {
        const std::vector<uint16_t> weight = [&] {
            std::vector<uint16_t> made(rows * LONG);
            const std::vector<float> values = random_floats(made.size(), 6);
            kernels_for(Dtype::bf16, GetParam()).downcast(values.data(), made.size(), made.data());
            return made;
        }();
        const auto multiply = [&](size_t first, size_t tokens) {
            std::vector<float> y(tokens * rows);
            linear.multiply({weight.data(), rows, LONG}, x.data() + first * LONG, tokens, y.data());
            return y;
        };
        const std::vector<float> all = multiply(0, TOKENS);
        for (size_t t = 0; t < TOKENS; t++) {
            const std::vector<float> one = multiply(t, 1);
            EXPECT_TRUE(std::equal(one.begin(), one.end(), all.begin() + static_cast<ptrdiff_t>(t * rows)));
            double dot = 0.0;
            for (size_t j = 0; j < LONG; j++) {
                const float value = std::bit_cast<float>(static_cast<uint32_t>(weight[j]) << 16);
                dot += static_cast<double>(x[t * LONG + j]) * static_cast<double>(value);
            }
            EXPECT_NEAR(one[0], dot, 1e-3);
        }
    }
}

TEST_P(LinearBits, AnInfiniteInputStaysInfinite) {
    Workers workers(1);
    std::vector<float> x(COLUMNS, 0.3f), y(ROWS);
    x[5] = std::numeric_limits<float>::infinity();
    const std::vector<uint16_t> ones(ROWS * COLUMNS, 0x3f80);
    Linear(workers, Dtype::bf16, GetParam()).multiply({ones.data(), ROWS, COLUMNS}, x.data(), 1, y.data());
    for (const float value : y) ASSERT_EQ(value, x[5]);
}

TEST_P(LinearBits, PredictorsServeSeveralThreadsAtOnce) {
    Workers workers(2);
    const std::vector<float> output = random_floats(500 * 33, 3), bias = random_floats(500, 4);
    const LowRankPredictor predictor(workers, Dtype::f32, {weight_.data(), 33, COLUMNS}, {output.data(), 500, 33},
                                     bias.data(), nullptr, GetParam());
    const std::vector<uint8_t> signs(500 * ((COLUMNS + 7) / 8), 0x55);
    const std::vector<int32_t> margin(500, 0);
    const SignPredictor by_sign(workers, signs.data(), 500, COLUMNS, margin.data(), GetParam());
    const Prediction expected = predictor.predict(x_.data(), 16);
    ASSERT_FALSE(expected.positions.empty());
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; caller++) {
        callers.emplace_back([&] {
            for (int turn = 0; turn < 20; turn++) {
                const Prediction again = predictor.predict(x_.data(), 16);
                EXPECT_EQ(again.positions, expected.positions);
                EXPECT_EQ(again.row_masks, expected.row_masks);
                EXPECT_EQ(by_sign.predict(x_.data(), 3).positions.size() % 500, 0U);
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, LinearBits,
                         testing::Values("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable"));
INSTANTIATE_TEST_SUITE_P(InstructionSets, LinearBitsOf16,
                         testing::Values("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable"));

}  // namespace
}  // namespace flashclient
