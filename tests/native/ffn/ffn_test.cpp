// The FFN's sums and the workers behind them, from several threads: what the sanitizers watch.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <thread>
#include <vector>

#include "ffn/ffn_sum.h"
#include "instruction_set.h"
#include "kernels/workers.h"
#include "random_floats.h"

namespace flashclient {
namespace {

TEST(Workers, EveryItemIsDoneOnceInEveryRun) {
    Workers workers(4);
    for (int run = 0; run < 2000; run++) {
        const size_t count = run % 37;
        std::vector<int> done(count, 0);  // plain: an item is one thread's, and run() makes it visible
        workers.run(count, [&](size_t item) { done[item] += 1; });
        for (const int times : done) ASSERT_EQ(times, 1);
    }
}

TEST(Workers, OneThreadIsTheCaller) {
    Workers workers(1);
    const auto caller = std::this_thread::get_id();
    workers.run(5, [&](size_t) { EXPECT_EQ(std::this_thread::get_id(), caller); });
    EXPECT_EQ(workers.threads(), 1U);
}

TEST(Workers, CallersAtTheSameTimeDoNotMixTheirItems) {
    Workers workers(3);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; caller++) {
        callers.emplace_back([&workers] {
            for (int run = 0; run < 500; run++) {
                std::vector<int> done(23, 0);
                workers.run(done.size(), [&](size_t item) { done[item] += 1; });
                for (const int times : done) ASSERT_EQ(times, 1);
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
}

TEST(Workers, StopWithoutARun) {
    for (int turn = 0; turn < 50; turn++) Workers workers(3);
}

// Bundles in bf16.
class NarrowBundles {
  public:
    explicit NarrowBundles(const Kernels& kernels) : kernels_(kernels) {}

    void add(const std::vector<float>& bundle) {
        std::vector<uint16_t>& narrow = bundles_.emplace_back(bundle.size());
        kernels_.downcast(bundle.data(), bundle.size(), narrow.data());
        addresses_.push_back(reinterpret_cast<uint64_t>(narrow.data()));
        readable_.emplace_back(narrow.data(), narrow.size() * sizeof(uint16_t));
    }

    std::span<const uint64_t> addresses() const { return addresses_; }

  private:
    const Kernels& kernels_;
    std::deque<std::vector<uint16_t>> bundles_;
    std::vector<uint64_t> addresses_;
    std::deque<ReadableMemory> readable_;
};

// Rows of exactly hidden elements at the end of an allocation: reading past one is an error of the address sanitizer.
class FfnBits : public OfInstructionSet {
  protected:
    static constexpr size_t HIDDEN = 77;
    static constexpr size_t NEURONS = 150;
    static constexpr float DEVIATION = 0.1f;

    void SetUp() override {
        OfInstructionSet::SetUp();
        if (IsSkipped()) return;
        for (size_t neuron = 0; neuron < NEURONS; neuron++) {
            bundles_.push_back(random_floats(3 * HIDDEN, static_cast<unsigned>(neuron), DEVIATION));
            addresses_.push_back(reinterpret_cast<uint64_t>(bundles_.back().data()));
            readable_.emplace_back(bundles_.back().data(), 3 * HIDDEN * sizeof(float));
        }
    }

    std::vector<float> sum(size_t threads, size_t chunk, size_t tokens) {
        Workers workers(threads);
        Ffn ffn(workers, {std::vector(3, weightd::plain_encoding(Dtype::f32)), HIDDEN, {Function::relu}}, GetParam());
        const std::vector<float> x = random_floats(tokens * HIDDEN, 1000, DEVIATION);
        std::vector<float> y(tokens * HIDDEN, 0.0f);
        for (size_t i = 0; i < NEURONS; i += chunk) {
            const auto part = std::span(addresses_).subspan(i, std::min(chunk, NEURONS - i));
            ffn.add_rows({part}, x.data(), tokens, y.data());
        }
        return y;
    }

    std::vector<std::vector<float>> bundles_;
    std::vector<uint64_t> addresses_;
    std::deque<ReadableMemory> readable_;
};

TEST_P(FfnBits, DoNotDependOnThreadsOrChunks) {
    for (const size_t tokens : {1, 3, 16, 37}) {
        const std::vector<float> expected = sum(1, NEURONS, tokens);
        EXPECT_EQ(sum(4, 7, tokens), expected);
        EXPECT_EQ(sum(3, 1, tokens), expected);
    }
}

// Many tokens are computed by other loops than few.
TEST_P(FfnBits, RowsOf16BitsDoNotDependOnTheOthersOrOnChunks) {
    constexpr size_t TOKENS = 83;
    const Kernels& kernels = kernels_for(Dtype::bf16, GetParam());
    NarrowBundles narrowed(kernels);
    for (const std::vector<float>& bundle : bundles_) narrowed.add(bundle);
    const std::span<const uint64_t> addresses = narrowed.addresses();
    std::vector<uint16_t> narrow(TOKENS * HIDDEN);
    std::vector<float> x = random_floats(TOKENS * HIDDEN, 1000);
    kernels.downcast(x.data(), x.size(), narrow.data());
    kernels.upcast(narrow.data(), x.size(), x.data());
    for (const Function function : {Function::silu, Function::relu}) {
        const auto sum = [&](size_t threads, size_t chunk, size_t first, size_t tokens) {
            Workers workers(threads);
            const FfnShape shape{std::vector(3, weightd::plain_encoding(Dtype::bf16)), HIDDEN, {function}};
            const Ffn ffn(workers, shape, GetParam());
            std::vector<float> y(tokens * HIDDEN, 0.5f);
            for (size_t i = 0; i < NEURONS; i += chunk) {
                const auto part = std::span(addresses).subspan(i, std::min(chunk, NEURONS - i));
                ffn.add_rows({part}, x.data() + first * HIDDEN, tokens, y.data());
            }
            return y;
        };
        const std::vector<float> all = sum(3, NEURONS, 0, TOKENS);
        EXPECT_EQ(sum(2, 37, 0, TOKENS), all);
        for (const auto& [first, tokens] : std::vector<std::pair<size_t, size_t>>{{0, 1}, {5, 2}, {9, 16}, {7, 33}}) {
            const std::vector<float> some = sum(1, 64, first, tokens);
            EXPECT_TRUE(std::equal(some.begin(), some.end(), all.begin() + static_cast<ptrdiff_t>(first * HIDDEN)));
        }
    }
}

// Chunks of any size, of which some end within a group, for numbers of rows that are computed by different loops. Some
// numbers are so small that products of bf16 count as 0, and some h are 0.
TEST_P(FfnBits, SumOverALayerDependsOnNeitherChunksNorOtherRows) {
    constexpr size_t TOKENS = 70;
    const Kernels& kernels = kernels_for(Dtype::bf16, GetParam());
    NarrowBundles narrowed(kernels);
    for (std::vector<float> bundle : bundles_) {
        const bool tiny = narrowed.addresses().size() % 5 == 0;
        for (size_t j = 2 * HIDDEN; tiny && j < 3 * HIDDEN; j++) bundle[j] *= 0x1p-120f;
        narrowed.add(bundle);
    }
    const std::span<const uint64_t> addresses = narrowed.addresses();
    const std::vector<float> x = random_floats(TOKENS * HIDDEN, 1000);
    for (const Function function : {Function::silu, Function::relu}) {
        const auto sum = [&](size_t threads, size_t chunk, size_t first, size_t tokens) {
            Workers workers(threads);
            const FfnShape shape{std::vector(3, weightd::plain_encoding(Dtype::bf16)), HIDDEN, {function}};
            const Ffn ffn(workers, shape, GetParam());
            std::vector<float> y(tokens * HIDDEN, 0.0f);
            FfnSum all(ffn, x.data() + first * HIDDEN, tokens, y.data());
            for (size_t i = 0; i < NEURONS; i += chunk) {
                all.add({std::span(addresses).subspan(i, std::min(chunk, NEURONS - i))});
            }
            all.finish();
            return y;
        };
        const std::vector<float> all = sum(3, NEURONS, 0, TOKENS);
        EXPECT_EQ(sum(1, 1, 0, TOKENS), all);
        EXPECT_EQ(sum(2, 37, 0, TOKENS), all);
        for (const auto& [first, tokens] : std::vector<std::pair<size_t, size_t>>{{0, 1}, {5, 2}, {9, 16}, {7, 33}}) {
            for (const size_t chunk : {5, 64, 150}) {
                const std::vector<float> some = sum(2, chunk, first, tokens);
                EXPECT_TRUE(std::equal(some.begin(), some.end(), all.begin() + static_cast<ptrdiff_t>(first * HIDDEN)));
            }
        }
    }
}

// Lists of other neurons for other rows, some of them the same rows; bundles of one neuron and slabs of 32.
TEST_P(FfnBits, TermsAreSumsOfTheirOwn) {
    constexpr size_t ROWS = 40;
    const std::vector<float> x = random_floats(ROWS * HIDDEN, 1000, DEVIATION);
    const std::vector<float> bias = random_floats(32 * NEURONS, 1001), up_bias = random_floats(32 * NEURONS, 1002);
    for (const size_t neurons : {1, 32}) {
        std::deque<std::vector<float>> bundles;
        std::deque<ReadableMemory> readable;
        std::vector<uint64_t> addresses;
        for (unsigned i = 0; i < 20; i++) {
            bundles.push_back(random_floats(3 * HIDDEN * neurons, i, DEVIATION));
            readable.emplace_back(bundles.back().data(), bundles.back().size() * sizeof(float));
            addresses.push_back(reinterpret_cast<uint64_t>(bundles.back().data()));
        }
        for (const size_t threads : {1, 3}) {
            Workers workers(threads);
            const FfnShape shape{
                std::vector(3, weightd::plain_encoding(Dtype::f32)), HIDDEN, {Function::relu}, neurons};
            const Ffn ffn(workers, shape, GetParam());
            std::vector<std::vector<float>> sums, expected;
            std::vector<FfnTerm> terms;
            const auto add = [&](size_t first, size_t count, size_t row, size_t tokens) {
                const Neurons list{std::span(addresses).subspan(first, count), bias.data() + first * neurons,
                                   up_bias.data() + first * neurons};
                terms.push_back({list, x.data() + row * HIDDEN, tokens, nullptr});
                std::vector<float>& alone = expected.emplace_back(tokens * HIDDEN, 0.5f);
                sums.push_back(alone);
                if (tokens > 0) ffn.add_rows(list, terms.back().x, tokens, alone.data());
            };
            for (const size_t tokens : {1, 1, 2, 17, 0, 1, 40}) add(terms.size(), 3 + terms.size(), 0, tokens);
            add(0, 0, 3, 5);
            for (size_t row = 0; row < 6; row++) add(row, 20 - row, row, 1);
            for (size_t i = 0; i < terms.size(); i++) terms[i].y = sums[i].data();
            ffn.add_terms(terms);
            EXPECT_EQ(sums, expected) << neurons << " " << threads;
        }
    }
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, FfnBits, testing::Values("amx", "avx512_bf16", "avx512", "avx2", "portable"));

}  // namespace
}  // namespace flashclient
