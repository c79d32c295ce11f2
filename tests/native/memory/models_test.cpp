#include "memory/models.h"

#include <gtest/gtest.h>

#include "bare_model.h"
#include "flash_file.h"
#include "memory/model_cost.h"

namespace weightd {
namespace {

struct ModelsTest : testing::Test {
    FlashModel first{1, 800, "first"};
    FlashModel second{1, 800, "second"};
    IdleReader reader;
    const uint64_t cost_bytes = minimum_dram_bytes(first.spec);
};

TEST_F(ModelsTest, AUserPaysForResidentWeightsAndTables) {
    Models models(cost_bytes + (1 << 20), reader);
    models.add(first.spec, false);
    const uint64_t before_bytes = models.memory().used_bytes();
    EXPECT_EQ(before_bytes, catalog_bytes(first.spec));
    ASSERT_TRUE(models.activate(0));
    EXPECT_EQ(models.memory().used_bytes(), before_bytes + activation_bytes(first.spec));
    EXPECT_EQ(models.memory().used_bytes(Account::resident), whole_pages(first.spec.resident_bytes));
    for (uint32_t users = 1; users < SESSIONS_RESERVED; users++) ASSERT_TRUE(models.activate(0));
    EXPECT_EQ(models.memory().used_bytes(), before_bytes + activation_bytes(first.spec));
    ASSERT_TRUE(models.activate(0));
    EXPECT_EQ(models.memory().used_bytes(), before_bytes + activation_bytes(first.spec) + session_bytes(first.spec));
    models.leave(0);
    EXPECT_EQ(models.memory().used_bytes(), before_bytes + activation_bytes(first.spec));
    for (uint32_t users = 0; users < SESSIONS_RESERVED; users++) models.leave(0);
    EXPECT_NE(models.at(0).pool, nullptr) << "an idle model stays until its memory is needed";
}

TEST_F(ModelsTest, AnIdleModelIsDeactivatedForAnother) {
    Models models(cost_bytes + catalog_bytes(second.spec), reader);
    models.add(first.spec, false);
    models.add(second.spec, false);
    ASSERT_TRUE(models.activate(0));
    EXPECT_THROW(models.activate(1), NoRoom) << "the first has a user";
    models.leave(0);
    ASSERT_TRUE(models.activate(1));
    EXPECT_EQ(models.at(0).pool, nullptr);
    models.leave(1);
    ASSERT_TRUE(models.activate(0));
    EXPECT_EQ(models.at(0).activations, 2U);
}

TEST_F(ModelsTest, ARemovedModelGivesBackAllItsMemoryAndIsNeverActiveAgain) {
    Models models(cost_bytes + catalog_bytes(second.spec) + (1 << 20), reader);
    models.add(first.spec, false);
    models.add(second.spec, false);
    ASSERT_TRUE(models.activate(0));
    EXPECT_FALSE(models.remove(0)) << "it has a user";
    const Place place = models.place_for(models.at(0), 3);
    models.leave(0);
    EXPECT_FALSE(models.remove(0)) << "a cell is being read";
    models.at(0).pool->loaded(place);
    models.note_fetch(0);
    for (uint32_t i = 0; i < IDLE_REBALANCES_MIN; i++) {
        EXPECT_FALSE(models.remove(0)) << "a remote client may come back";
        models.rebalance();
    }
    EXPECT_TRUE(models.remove(0));
    EXPECT_EQ(models.memory().used_bytes(), catalog_bytes(second.spec));
    EXPECT_THROW(models.activate(0), ModelRemoved);
    EXPECT_TRUE(models.remove(0)) << "once more changes nothing";
    EXPECT_EQ(models.memory().used_bytes(), catalog_bytes(second.spec));
    EXPECT_TRUE(models.activate(1));
    EXPECT_EQ(models.add(first.spec, false), 2U) << "its index is not used again";
}

TEST_F(ModelsTest, ACellIsPlacedWhereThereIsRoomElseWhereTheLeastUsedWas) {
    Models models(cost_bytes, reader);
    models.add(first.spec, false);
    ASSERT_TRUE(models.activate(0));
    Model& model = models.at(0);
    uint32_t cell = 0;
    for (; model.pool->evictions() == 0; cell++) {
        const Place place = models.place_for(model, cell);
        ASSERT_TRUE(place);
        model.pool->touched(cell);
        model.pool->loaded(place);
    }
    EXPECT_EQ(model.pool->slots(), cell - 1);
    EXPECT_EQ(model.evictions(), 1U);
}

TEST_F(ModelsTest, PredictorsArePaidUntilTheirLastUserLetsGo) {
    Models models(cost_bytes + (1 << 20), reader);
    models.add(first.spec, false);
    ASSERT_TRUE(models.activate(0));
    const uint64_t before_bytes = models.memory().used_bytes();
    auto predictors = models.reserve_predictors(0, {"predictors.safetensors", 5000, 0, 3});
    ASSERT_NE(predictors, nullptr);
    EXPECT_EQ(predictors->version, 3U);
    auto user = predictors;
    predictors.reset();
    EXPECT_EQ(models.memory().used_bytes(), before_bytes + 8192);
    user.reset();
    EXPECT_EQ(models.memory().used_bytes(), before_bytes);
}

TEST_F(ModelsTest, SeedsOfAnotherNumberOfCellsAreRefused) {
    Models models(cost_bytes, reader);
    models.add(first.spec, false);
    EXPECT_THROW(models.seed(0, std::vector<Hotness>(3)), std::invalid_argument);
    const std::vector<Hotness> hotness(first.spec.cell_count(), 70);
    models.seed(0, hotness);
    EXPECT_EQ(models.hotness(0), hotness);
}

}  // namespace
}  // namespace weightd
