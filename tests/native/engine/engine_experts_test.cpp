// Experts in the engine: ranges of cells that are used at random, not a scan.
#include <gtest/gtest.h>

#include <numeric>

#include "bare_model.h"
#include "engine/engine.h"
#include "flash_file.h"
#include "memory/model_cost.h"
#include "settle.h"

namespace weightd {
namespace {

struct EngineExpertsTest : testing::Test {
    static constexpr uint32_t EXPERTS = 4, CELLS = 4;  // of an expert
    FlashModel flash{2, EXPERTS* CELLS * 4};
    std::string note;
    std::unique_ptr<Reader> reader = make_reader("threads", 4, 16, note);
    Verifier verifier{1};
    std::unique_ptr<Engine> engine;

    void start(uint32_t experts_in_pool) {
        for (LayerSpec& layer : flash.spec.layers) layer.experts = EXPERTS;
        const uint64_t slots = uint64_t{experts_in_pool} * CELLS;
        const uint64_t dram = minimum_dram_bytes(flash.spec) + (slots - 3 * SHARE_SLOTS_MIN) * flash.spec.cell_bytes;
        engine = std::make_unique<Engine>(dram, *reader, verifier, false);
        engine->models().add(flash.spec, false);
    }

    CountingSession& open(uint32_t share) {
        EXPECT_TRUE(engine->models().activate(0));
        const uint32_t cells = flash.spec.cell_count();
        return static_cast<CountingSession&>(engine->open(std::make_unique<CountingSession>(0, cells, share)));
    }

    static std::vector<uint32_t> cells_of(std::initializer_list<uint32_t> experts) {
        std::vector<uint32_t> cells;
        for (const uint32_t expert : experts) {
            for (uint32_t i = 0; i < CELLS; i++) cells.push_back(expert * CELLS + i);
        }
        return cells;
    }

    void use(Session& session, uint32_t layer, std::initializer_list<uint32_t> experts) {
        ASSERT_TRUE(engine->acquire(session, layer, cells_of(experts), 0));
        settle(*engine);
        ASSERT_TRUE(engine->release(session, layer, cells_of(experts)));
    }
};

TEST_F(EngineExpertsTest, NeighbouringExpertsAreNoScan) {
    start(8);
    CountingSession& one = open(8);
    CountingSession& other = open(8);
    use(one, 0, {0, 1});
    use(other, 0, {2, 3});
    ASSERT_TRUE(engine->acquire(one, 1, cells_of({0, 1}), 0));
    ASSERT_TRUE(engine->acquire(other, 1, cells_of({1, 2}), 0));
    EXPECT_EQ(engine->scans(0).count(), 0U);
    EXPECT_FALSE(engine->defers_reads());
    settle(*engine);
    EXPECT_EQ(one.grants + other.grants, 8U * CELLS);
}

TEST_F(EngineExpertsTest, NothingIsReadInThePlaceOfWhatTheSameRequestNames) {
    start(2);
    CountingSession& session = open(2 * CELLS);
    use(session, 0, {0});
    use(session, 0, {1});
    EXPECT_EQ(session.misses, 2U * CELLS);
    use(session, 0, {2, 0});
    EXPECT_EQ(session.hits, 1U * CELLS);
    EXPECT_EQ(session.misses, 3U * CELLS);
}

TEST_F(EngineExpertsTest, TheExpertThatIsUsedMostStays) {
    start(2);
    CountingSession& session = open(2 * CELLS);
    for (uint32_t token = 0; token < 30; token++) {
        use(session, 0, {0});
        use(session, 1, {token % 3 + 1});
    }
    EXPECT_EQ(session.hits, 29U * CELLS);
    EXPECT_EQ(engine->model(0).counts.reads, 31U);  // an expert is one read
}

TEST_F(EngineExpertsTest, WhatWasPrefetchedIsThere) {
    start(4);
    CountingSession& session = open(4 * CELLS);
    use(session, 0, {0});
    ASSERT_TRUE(engine->prefetch(session, 1, cells_of({2, 3}), 0));
    settle(*engine);
    EXPECT_EQ(session.held_cells, 0U);
    EXPECT_EQ(session.prefetched, 2U * CELLS);
    for (int again = 0; again < 2; again++) use(session, 1, {2});
    EXPECT_EQ(session.misses, 1U * CELLS);
    EXPECT_EQ(session.hits, 2U * CELLS);
    EXPECT_EQ(session.prefetched_used, 1U * CELLS) << "the second use is a hit like any other";
    EXPECT_EQ(engine->model(0).counts.prefetched, 2U * CELLS);
    EXPECT_EQ(engine->model(0).counts.prefetched_used, 1U * CELLS);
}

TEST_F(EngineExpertsTest, AGuessEndsWhenItsStepBegins) {
    start(4);
    CountingSession& session = open(4 * CELLS);
    ASSERT_TRUE(engine->prefetch(session, 1, cells_of({2}), 0));
    use(session, 1, {3});
    EXPECT_EQ(session.prefetched, 0U);
    ASSERT_TRUE(engine->prefetch(session, 1, cells_of({0}), 0));
    ASSERT_TRUE(engine->prefetch(session, 0, cells_of({1}), 0)) << "takes the place of the other";
    settle(*engine);
    EXPECT_EQ(session.prefetched, 1U * CELLS);
    ASSERT_TRUE(engine->prefetch(session, 1, cells_of({1}), 0));
    engine->close(session.id);
    settle(*engine);
    EXPECT_EQ(engine->model(0).counts.prefetched, 1U * CELLS);
}

TEST_F(EngineExpertsTest, AHintTakesThePlaceOfTheOneBefore) {
    start(8);
    CountingSession& session = open(8 * CELLS);
    ASSERT_TRUE(engine->prefetch(session, 1, cells_of({0}), 1));
    ASSERT_TRUE(engine->prefetch(session, 1, cells_of({1}), 1)) << "a hint may have several requests";
    settle(*engine);
    EXPECT_EQ(session.prefetched, 2U * CELLS);
    ASSERT_TRUE(engine->prefetch(session, 1, cells_of({2}), 2));
    ASSERT_TRUE(engine->prefetch(session, 1, cells_of({3}), 3));
    settle(*engine);
    EXPECT_EQ(session.prefetched, 3U * CELLS);
    use(session, 1, {3});
    EXPECT_EQ(session.prefetched_used, 1U * CELLS);
}

TEST_F(EngineExpertsTest, WhatIsAskedForIsReadBeforeWhatIsGuessed) {
    start(8);
    CountingSession& session = open(8 * CELLS);
    ASSERT_TRUE(engine->prefetch(session, 1, cells_of({0, 1, 2, 3}), 0));
    ASSERT_TRUE(engine->acquire(session, 0, cells_of({0, 1, 2, 3}), 0));
    engine->step();
    EXPECT_LE(session.prefetched, (PREFETCH_READS_MAX - 1) * READ_BYTES_MAX / flash.spec.cell_bytes);
    settle(*engine);
    EXPECT_EQ(session.grants, 4U * CELLS);
    EXPECT_EQ(session.prefetched, 4U * CELLS);
}

TEST_F(EngineExpertsTest, NothingEvictsAGuessBeforeItsStep) {
    start(3);
    CountingSession& session = open(3 * CELLS);
    for (int token = 0; token < 20; token++) use(session, 0, {0, 1});
    ASSERT_TRUE(engine->prefetch(session, 1, cells_of({2}), 0));
    settle(*engine);
    use(session, 0, {3});
    const uint64_t misses = session.misses;
    use(session, 1, {2});
    EXPECT_EQ(session.misses, misses);
}

TEST_F(EngineExpertsTest, ExpertsThatBeginWithinACellAreRefused) {
    flash.spec.layers[0].experts = 3;
    EXPECT_THROW(flash.spec.require_sound(), std::invalid_argument);
}

}  // namespace
}  // namespace weightd
