// Blocks of attention in several threads, over arrays at the end of their allocation: what the sanitizers watch. And
// the rounding of fp32 to 16 bits.
#include "kernels/attention_block.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "instruction_set.h"
#include "random_floats.h"

namespace flashclient {
namespace {

class BlockBits : public OfInstructionSet {
  protected:
    static constexpr size_t HIDDEN = 40;
    static constexpr size_t ELEMENTS = 10;
    static constexpr size_t HEADS = 4;
    static constexpr size_t KEY_HEADS = 2;
    static constexpr size_t SEQUENCES = 2;
    static constexpr size_t TOKENS = 7;

    Norm norm(NormKind kind) const { return {kind, HIDDEN, norm_.data(), norm_.data(), 1e-6f, 0.5f}; }

    AttentionBlock block() const {
        const Norm of_head{NormKind::rms, ELEMENTS, norm_.data(), nullptr, 1e-6f, 0.0f};
        const AttentionProjection query{
            {query_.data(), HEADS * ELEMENTS, HIDDEN}, {bias_.data(), false}, of_head, 0.7f};
        const AttentionProjection key{{key_.data(), KEY_HEADS * ELEMENTS, HIDDEN}, {}, of_head, 1.0f};
        const AttentionProjection value{{value_.data(), KEY_HEADS * ELEMENTS, HIDDEN}, {}, {}, 1.0f};
        const AttentionProjection output{{output_.data(), HIDDEN, HEADS * ELEMENTS}, {bias_.data(), true}, {}, 1.0f};
        return {{query, key, value, ELEMENTS, Pairs::halves},
                output,
                norm(NormKind::rms),
                norm(NormKind::scaled_rms),
                norm(NormKind::layer),
                0.3f};
    }

    // The sums and the inputs of the FFN, after passes of so many tokens each.
    std::vector<float> passes(const AttentionBlocks& blocks, const std::vector<size_t>& tokens, bool in_blocks) const {
        const size_t row = in_blocks ? Attention::block_row_bytes(ELEMENTS) : ELEMENTS;  // in units of strides
        std::vector<char> keys(SEQUENCES * KEY_HEADS * TOKENS * row * (in_blocks ? 1 : sizeof(float)));
        std::vector<char> values(keys.size());
        std::vector<float> all(2 * SEQUENCES * TOKENS * HIDDEN);
        size_t held = 0;
        for (const size_t some : tokens) {
            std::vector<float> x, sum(SEQUENCES * some * HIDDEN), ffn(sum.size());
            for (size_t s = 0; s < SEQUENCES; s++) {
                const auto first = x_.begin() + static_cast<ptrdiff_t>((s * TOKENS + held) * HIDDEN);
                x.insert(x.end(), first, first + static_cast<ptrdiff_t>(some * HIDDEN));
            }
            const size_t head = TOKENS * row;
            const KeyValueRoom room{
                {keys.data(), KEY_HEADS * head, head}, {values.data(), KEY_HEADS * head, head}, held, in_blocks};
            const Rotation rotation{cos_.data() + held * ELEMENTS, sin_.data() + held * ELEMENTS, ELEMENTS, 0,
                                    ELEMENTS};
            const AttentionMask mask{some == TOKENS ? AttentionMask::Kind::causal : AttentionMask::Kind::none};
            blocks.compute(block(), x.data(), SEQUENCES, some, rotation, room, mask, sum.data(), ffn.data(), false);
            for (size_t s = 0; s < SEQUENCES; s++) {
                for (size_t i = 0; i < some * HIDDEN; i++) {
                    const size_t to = (s * TOKENS + held) * HIDDEN + i;
                    all[to] = sum[s * some * HIDDEN + i];
                    all[SEQUENCES * TOKENS * HIDDEN + to] = ffn[s * some * HIDDEN + i];
                }
            }
            held += some;
        }
        return all;
    }

    std::vector<float> x_ = random_floats(SEQUENCES * TOKENS * HIDDEN, 1);
    std::vector<float> query_ = random_floats(HEADS * ELEMENTS * HIDDEN, 2);
    std::vector<float> key_ = random_floats(KEY_HEADS * ELEMENTS * HIDDEN, 3);
    std::vector<float> value_ = random_floats(KEY_HEADS * ELEMENTS * HIDDEN, 4);
    std::vector<float> output_ = random_floats(HIDDEN * HEADS * ELEMENTS, 5);
    std::vector<float> bias_ = random_floats(HEADS * ELEMENTS, 6);
    std::vector<float> norm_ = random_floats(HIDDEN, 7);
    std::vector<float> cos_ = random_floats(TOKENS * ELEMENTS, 8);
    std::vector<float> sin_ = random_floats(TOKENS * ELEMENTS, 9);
};

TEST_P(BlockBits, DoNotDependOnThreadsCallersOrPasses) {
    Workers one(1), four(4);
    const AttentionBlocks shared(four, Dtype::f32, GetParam());
    for (const bool in_blocks : {false, true}) {
        const std::vector<float> expected = passes(AttentionBlocks(one, Dtype::f32, GetParam()), {TOKENS}, in_blocks);
        std::vector<std::vector<float>> results(3);
        std::vector<std::thread> callers;
        for (auto& result : results) {
            callers.emplace_back([&] { result = passes(shared, {1, 1, 1, 1, 1, 1, 1}, in_blocks); });
        }
        for (std::thread& caller : callers) caller.join();
        for (const auto& result : results) EXPECT_EQ(result, expected);
    }
}

TEST_P(BlockBits, AFfnIsToldWhatItWouldTakeIfAttentionAddedNothing) {
    Workers workers(2);
    const AttentionBlocks blocks(workers, Dtype::f32, GetParam());
    AttentionBlock with_norm = block(), without = block();
    without.before_ffn.reset();
    std::vector<float> normed(HIDDEN), keys(KEY_HEADS * ELEMENTS), values(keys.size()), out(HIDDEN);
    Norms(workers, Dtype::f32, GetParam()).apply(*with_norm.before_ffn, x_.data(), 1, normed.data());
    const KeyValueRoom room{{keys.data(), keys.size(), ELEMENTS}, {values.data(), values.size(), ELEMENTS}, 0, false};
    const Rotation rotation{cos_.data(), sin_.data(), ELEMENTS, 0, ELEMENTS};
    for (const auto& [one, expected] : {std::pair{&with_norm, normed.data()}, {&without, x_.data()}}) {
        std::vector<float> told;
        blocks.layer(
            *one, x_.data(), 1, 1, rotation, room, {AttentionMask::Kind::none},
            [&](const void* x, size_t rows) {
                told.assign(static_cast<const float*>(x), static_cast<const float*>(x) + rows * HIDDEN);
            },
            [&](const float* x, size_t rows, float* y) {
                EXPECT_FALSE(told.empty()) << "before the FFN runs";
                std::copy_n(x, rows * HIDDEN, y);
            },
            {}, out.data());
        EXPECT_EQ(told, std::vector<float>(expected, expected + HIDDEN));
    }
}

TEST_P(BlockBits, NumbersOf16BitsAreRoundedToTheNearest) {
    for (const Dtype dtype : {Dtype::bf16, Dtype::f16}) {
        const Kernels& kernels = kernels_for(dtype, GetParam());
        std::vector<uint16_t> bits(1 << 16), back(bits.size());
        for (size_t i = 0; i < bits.size(); i++) bits[i] = static_cast<uint16_t>(i);
        std::vector<float> values(bits.size());
        kernels.upcast(bits.data(), bits.size(), values.data());
        kernels.downcast(values.data(), values.size(), back.data());
        for (size_t i = 0; i < bits.size(); i++) {
            if (std::isnan(values[i])) continue;
            EXPECT_EQ(back[i], bits[i]);
        }
        // Between neighbours: the nearer one, and the even one in the middle.
        for (size_t i = 0; i + 1 < 0x7c00; i++) {
            const double low = values[i], high = values[i + 1];
            if (!std::isfinite(high)) break;
            const float middle = static_cast<float>((low + high) / 2);
            const float tried[] = {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)};
            uint16_t rounded[3];
            kernels.downcast(tried, 3, rounded);
            EXPECT_EQ(rounded[0], i % 2 == 0 ? i : i + 1);
            EXPECT_EQ(rounded[1], i);
            EXPECT_EQ(rounded[2], i + 1);
        }
        const float special[] = {INFINITY, -INFINITY, 3e38f * 2, NAN, -0.0f};
        uint16_t of_special[5];
        kernels.downcast(special, 5, of_special);
        const uint16_t infinite = dtype == Dtype::f16 ? 0x7c00 : 0x7f80;
        EXPECT_EQ(of_special[0], infinite);
        EXPECT_EQ(of_special[1], infinite | 0x8000);
        EXPECT_EQ(of_special[2], infinite);
        EXPECT_GT(of_special[3] & 0x7fff, infinite);
        EXPECT_EQ(of_special[4], 0x8000);
    }
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, BlockBits,
                         testing::Values("amx", "avx512_bf16", "avx512", "avx2", "portable"));

}  // namespace
}  // namespace flashclient
