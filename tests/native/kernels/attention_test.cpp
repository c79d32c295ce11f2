// Attention from several threads, over rows and masks at the end of their allocation: what the sanitizers watch. And
// the exponentials of a softmax.
#include "kernels/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "instruction_set.h"
#include "random_floats.h"

namespace flashclient {
namespace {

class AttentionBits : public OfInstructionSet {
  protected:
    static constexpr float SINKS[6] = {0.3f, -1.0f, 2.0f, 0.0f, 7.0f, -30.0f};
    static constexpr AttentionShape SHAPE{2, 6, 2, 5, 131, 37, 21, 0.3f, false, 1.5f, SINKS};

    void SetUp() override {
        OfInstructionSet::SetUp();
        if (IsSkipped()) return;
        std::mt19937 random(4);
        for (uint8_t& byte : mask_) byte = random() % 3 != 0;
    }

    static AttentionRows rows(const std::vector<float>& values, size_t heads, size_t count, size_t elements) {
        return {values.data(), heads * count * elements * sizeof(float), count * elements * sizeof(float),
                elements * sizeof(float)};
    }

    std::vector<float> attend(const Attention& attention) const {
        const auto [sequences, heads, key_heads, tokens, keys, key_elements, value_elements, scale, in_blocks, softcap,
                    sinks] = SHAPE;
        std::vector<float> out(sequences * tokens * heads * value_elements, -1.0f);
        const AttentionMask mask{AttentionMask::Kind::boolean, mask_.data(), tokens * keys, 0, keys, 1};
        attention.attend(SHAPE, rows(query_, heads, tokens, key_elements), rows(key_, key_heads, keys, key_elements),
                         rows(value_, key_heads, keys, value_elements), mask, out.data());
        return out;
    }

    std::vector<float> query_ = random_floats(2 * 6 * 5 * 37, 1);
    std::vector<float> key_ = random_floats(2 * 2 * 131 * 37, 2);
    std::vector<float> value_ = random_floats(2 * 2 * 131 * 21, 3);
    std::vector<uint8_t> mask_ = std::vector<uint8_t>(2 * 5 * 131);
};

TEST_P(AttentionBits, DoNotDependOnThreadsOrCallers) {
    Workers one(1), four(4);
    const std::vector<float> expected = attend(Attention(one, Dtype::f32, GetParam()));
    const Attention shared(four, Dtype::f32, GetParam());
    std::vector<std::thread> callers;
    std::vector<std::vector<float>> results(3);
    for (auto& result : results) {
        callers.emplace_back([&] {
            for (int turn = 0; turn < 20; turn++) result = attend(shared);
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (const auto& result : results) EXPECT_EQ(result, expected);
}

TEST_P(AttentionBits, ExponentialsAreThoseOfTheFormula) {
    const Kernels& kernels = kernels_for(Dtype::f32, GetParam());
    for (const size_t count : {1, 3, 16, 37, 400}) {
        std::vector<float> values = random_floats(count, 5);
        for (float& value : values) value *= 25.0f;
        const std::vector<float> given = values;
        const float greatest = *std::max_element(given.begin(), given.end());
        double total = 0.0;
        const float sum = kernels.exponentials(values.data(), count);
        for (size_t i = 0; i < count; i++) {
            const double x = static_cast<double>(given[i] - greatest);
            EXPECT_NEAR(values[i], std::exp(x), 2e-7 * std::exp(x) + 1e-38) << x;
            if (x < -87.7) {
                EXPECT_EQ(values[i], 0.0f);
            }
            total += values[i];
        }
        EXPECT_NEAR(sum, total, 1e-5 * total);
    }
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, AttentionBits,
                         testing::Values("amx", "avx512_bf16", "avx512", "avx2", "portable"));

}  // namespace
}  // namespace flashclient
