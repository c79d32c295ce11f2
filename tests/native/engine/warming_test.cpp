// Hot cells are read in the background, and are in the way of no session.
#include <gtest/gtest.h>

#include <numeric>

#include "bare_model.h"
#include "engine/engine.h"
#include "flash_file.h"
#include "memory/model_cost.h"
#include "settle.h"

namespace weightd {
namespace {

struct WarmingTest : testing::Test {
    static constexpr uint32_t CELLS = 400;
    std::string note;
    std::unique_ptr<Reader> reader = make_reader("threads", 2, 32, note);
    Verifier verifier{1};
    FlashModel flash{2, CELLS / 2 * 4};

    static CountingSession& open(Engine& engine, uint32_t model = 0) {
        EXPECT_TRUE(engine.models().activate(model));
        return static_cast<CountingSession&>(engine.open(std::make_unique<CountingSession>(model, CELLS, 4, true)));
    }

    uint64_t dram_for(uint32_t slots) const { return minimum_dram_bytes(flash.spec) + slots * uint64_t{4096}; }

    // Each `every`-th cell is hot, and later ones are hotter. The other cells are cold.
    static std::vector<Hotness> each(uint32_t every) {
        std::vector<Hotness> hotness(CELLS);
        for (uint32_t cell = 0; cell < CELLS; cell += every) hotness[cell] = static_cast<Hotness>(20 + cell / 4);
        return hotness;
    }

    static bool acquire(Engine& engine, CountingSession& session, uint32_t cell) {
        const uint32_t before = session.grants;
        EXPECT_TRUE(engine.acquire(session, cell / (CELLS / 2), std::array{cell % (CELLS / 2)}, 0));
        settle(engine);
        if (session.grants == before) return false;
        EXPECT_TRUE(engine.release(session, cell / (CELLS / 2), std::array{cell % (CELLS / 2)}));
        return true;
    }
};

TEST_F(WarmingTest, HotCellsAreReadWhenTheFirstSessionOpens) {
    Engine engine(dram_for(CELLS), *reader, verifier);
    engine.models().add(flash.spec, false);
    engine.models().seed(0, each(5));
    settle(engine);
    EXPECT_EQ(engine.model(0).counts.reads, 0U) << "nobody uses the model";
    CountingSession& session = open(engine);
    settle(engine);
    EXPECT_EQ(engine.model(0).pool->filled(), CELLS / 5);
    for (uint32_t cell = 0; cell < CELLS; cell += 5) EXPECT_TRUE(acquire(engine, session, cell));
    EXPECT_EQ(engine.model(0).counts.misses, 0U);
    EXPECT_EQ(engine.model(0).pool->busy(), 0U);
}

TEST_F(WarmingTest, ItTakesOnlyFreeSlotsForTheHottestCellsFirst) {
    Engine engine(dram_for(60), *reader, verifier);
    engine.models().add(flash.spec, false);
    engine.models().seed(0, each(2));
    open(engine);
    settle(engine);
    const uint64_t slots = engine.model(0).pool->slots();
    ASSERT_LT(slots, 100U);
    EXPECT_EQ(engine.model(0).pool->filled(), slots);
    EXPECT_EQ(engine.model(0).pool->evictions(), 0U);
    for (uint32_t cell = CELLS - 100; cell < CELLS; cell += 2) EXPECT_TRUE(engine.model(0).pool->find(cell)) << cell;
}

TEST_F(WarmingTest, CellsThatWereInThePoolComeBeforeHotterOnes) {
    Engine engine(dram_for(20), *reader, verifier);
    engine.models().add(flash.spec, false);
    std::vector<Hotness> hotness(CELLS, HOTNESS_MAX);
    for (uint32_t cell = 3; cell < CELLS; cell += 20) hotness[cell] = HOTNESS_IN_POOL + 1;
    engine.models().seed(0, hotness);
    open(engine);
    settle(engine);
    ASSERT_LT(engine.model(0).pool->slots(), CELLS / 2);
    for (uint32_t cell = 3; cell < CELLS; cell += 20) EXPECT_TRUE(engine.model(0).pool->find(cell)) << cell;
}

TEST_F(WarmingTest, ItStartsNoReadWhileASessionReadsAndReadsLittleAtATime) {
    FlashModel wide(1, CELLS, "wide", 16384);
    wide.spec.bundles_per_cell = 1;
    wide.spec.layers[0].cells = wide.spec.layers[0].neurons = CELLS / 16;
    wide.spec.checksums.clear();
    for (uint32_t cell = 0; cell < CELLS / 16; cell++) {
        wide.spec.checksums.push_back(checksum({wide.cell(0, cell), 1000}));
    }
    Engine engine(dram_for(4 * CELLS), *reader, verifier);
    engine.models().add(wide.spec, false);
    engine.models().seed(0, std::vector<Hotness>(CELLS / 16, 200));
    EXPECT_TRUE(engine.models().activate(0));
    Session& session = engine.open(std::make_unique<CountingSession>(0, CELLS / 16, 4, true));
    EXPECT_TRUE(engine.acquire(session, 0, std::array{3U}, 0));
    engine.step();
    EXPECT_EQ(engine.model(0).counts.read_bytes, 16384U) << "only the session's own cell";
    uint64_t before = 16384;
    while (engine.step() || engine.reading()) {
        const uint64_t now = engine.model(0).counts.read_bytes;
        EXPECT_LE(now - before, WARM_BYTES_MAX + GAP_BYTES_MAX) << "the gap is the cell that is in the pool";
        before = now;
    }
    EXPECT_EQ(engine.model(0).pool->filled(), CELLS / 16);
}

TEST_F(WarmingTest, ASessionTakesTheSlotsThatWarmCellsFill) {
    Engine engine(dram_for(60), *reader, verifier);
    engine.models().add(flash.spec, false);
    engine.models().seed(0, each(2));
    CountingSession& session = open(engine);
    settle(engine);
    ASSERT_FALSE(engine.model(0).pool->has_free());
    std::vector<uint32_t> wanted(session.lease_limit);
    std::iota(wanted.begin(), wanted.end(), 0);
    ASSERT_GT(wanted.size(), 20U);
    EXPECT_TRUE(engine.acquire(session, 0, wanted, 0));
    settle(engine);
    EXPECT_EQ(session.grants, wanted.size());
}

TEST_F(WarmingTest, AnotherModelGetsTheMemoryThatWarmCellsFill) {
    FlashModel other(2, CELLS / 2 * 4, "other");
    Engine engine(2 * minimum_dram_bytes(flash.spec) + 200 * 4096, *reader, verifier);
    engine.models().add(flash.spec, false);
    engine.models().add(other.spec, false);
    engine.models().seed(0, std::vector<Hotness>(CELLS, 200));
    open(engine);
    settle(engine);
    ASSERT_GT(engine.model(0).pool->filled(), 200U);
    bool active = false;
    for (uint32_t turn = 0; turn < 100 && !active; turn++) {
        active = engine.models().activate(1);
        settle(engine);
    }
    ASSERT_TRUE(active);
    CountingSession& session = static_cast<CountingSession&>(
        engine.open(std::make_unique<CountingSession>(1, CELLS, engine.models().share_for(1, 0), true)));
    std::vector<uint32_t> wanted(session.share_slots);
    std::iota(wanted.begin(), wanted.end(), 0);
    EXPECT_TRUE(engine.acquire(session, 0, wanted, 0));
    settle(engine);
    EXPECT_EQ(session.grants, wanted.size());
}

TEST_F(WarmingTest, ACorruptCellIsDroppedAndFailsForASessionThatWantsIt) {
    flip_byte(flash.spec.bundles_path, flash.offset(0, 5 * 4));
    Engine engine(dram_for(CELLS), *reader, verifier);
    engine.models().add(flash.spec, false);
    engine.models().seed(0, each(5));
    CountingSession& session = open(engine);
    settle(engine);
    EXPECT_EQ(engine.model(0).counts.verify_errors, 1U);
    EXPECT_FALSE(engine.model(0).pool->find(5));
    EXPECT_FALSE(acquire(engine, session, 5));
    EXPECT_EQ(session.failures[ring::CORRUPT], 1U);
}

TEST_F(WarmingTest, AModelThatIsActivatedAgainIsAsWarmAsItWas) {
    Engine engine(dram_for(CELLS), *reader, verifier);
    engine.models().add(flash.spec, false);
    FlashModel large(1, 3 * CELLS, "large");
    large.spec.resident_bytes = CELLS * 4096 / 2;
    engine.models().add(large.spec, false);
    CountingSession& session = open(engine);
    for (uint32_t turn = 0; turn < 5; turn++) {
        for (uint32_t cell = 7; cell < CELLS; cell += 10) EXPECT_TRUE(acquire(engine, session, cell));
    }
    engine.close(session.id);
    engine.models().leave(0);
    EXPECT_TRUE(engine.models().activate(1));
    EXPECT_EQ(engine.model(0).pool, nullptr);
    engine.models().leave(1);
    CountingSession& again = open(engine);
    settle(engine);
    const uint64_t misses = engine.model(0).counts.misses;
    for (uint32_t cell = 7; cell < CELLS; cell += 10) EXPECT_TRUE(acquire(engine, again, cell));
    EXPECT_EQ(engine.model(0).counts.misses, misses);
}

TEST_F(WarmingTest, NothingIsReadWithoutWarming) {
    Engine engine(dram_for(CELLS), *reader, verifier, false);
    engine.models().add(flash.spec, false);
    engine.models().seed(0, each(5));
    open(engine);
    settle(engine);
    EXPECT_EQ(engine.model(0).counts.reads, 0U);
}

TEST_F(WarmingTest, SeedsOfAnotherNumberOfCellsAreRefused) {
    Engine engine(dram_for(CELLS), *reader, verifier);
    engine.models().add(flash.spec, false);
    EXPECT_THROW(engine.models().seed(0, std::vector<Hotness>(CELLS - 1)), std::invalid_argument);
}

}  // namespace
}  // namespace weightd
