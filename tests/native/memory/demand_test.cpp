#include "memory/demand.h"

#include <gtest/gtest.h>

#include "bare_model.h"

namespace weightd {
namespace {

struct DemandTest : testing::Test {
    ModelList models;
    Demand demand;
    Model& busy = add_active(models, 100);
    Model& idle = add_active(models, 100);

    DemandTest() {
        for (const auto& model : models) add_slots(*model, 10);
    }

    // Uses so many cells, one after another; nearly each use beyond the slots evicts.
    static void use(Model& model, uint32_t cells) {
        for (uint32_t i = 0; i < cells; i++) {
            const uint32_t cell = static_cast<uint32_t>(model.counts.misses++ % 100);
            if (!model.pool->find(cell)) model.pool->loaded(model.pool->insert(cell));
        }
    }

    std::optional<Demand::Transfer> transfer(bool can_spare = true) const {
        return demand.transfer(models, [&](const Model&) { return can_spare; });
    }
    void note() {
        for (const auto& model : models) demand.note(*model);
    }
};

TEST_F(DemandTest, ASegmentGoesToTheModelThatEvictsFromTheOneThatIsUsedLess) {
    use(busy, 50);
    use(idle, 5);
    note();
    const auto found = transfer();
    ASSERT_TRUE(found);
    EXPECT_EQ(found->to, &busy);
    EXPECT_EQ(found->from, &idle);
    EXPECT_FALSE(transfer(false)) << "no model can spare a segment";
}

TEST_F(DemandTest, AModelThatEvictsNothingGetsNothing) {
    use(busy, 10);
    note();
    EXPECT_FALSE(transfer());
}

TEST_F(DemandTest, ModelsThatAreUsedAlikeKeepWhatTheyHave) {
    use(busy, 50);
    use(idle, 30);
    note();
    EXPECT_FALSE(transfer()) << "less than twice as many uses";
}

TEST_F(DemandTest, OldUsesCountForLess) {
    use(busy, 50);
    use(idle, 50);
    note();
    for (int second = 0; second < 20; second++) {
        use(busy, 20);
        note();
    }
    const auto found = transfer();
    ASSERT_TRUE(found);
    EXPECT_EQ(found->from, &idle);
}

TEST_F(DemandTest, NothingMovesWhileASegmentDrains) {
    use(busy, 50);
    note();
    ASSERT_TRUE(transfer());
    ASSERT_TRUE(idle.pool->start_draining());
    EXPECT_FALSE(transfer());
}

TEST_F(DemandTest, ForgetsAModel) {
    use(busy, 50);
    note();
    demand.forget(busy);
    EXPECT_FALSE(transfer());
}

}  // namespace
}  // namespace weightd
