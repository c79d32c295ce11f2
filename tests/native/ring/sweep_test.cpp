// A client's walk through all bundles, over the ring.
#include <array>

#include "ring_fixture.h"

namespace {

struct SweepTest : RingFixture {};

TEST_F(SweepTest, SweepsThroughAPoolOfAnySize) {
    FlashModel model(3, 301);
    for (const uint32_t slots : {0U, 7U, 100U, 300U}) {
        const auto engine = serve(model, slots);
        const auto session = attach(*engine, 64);
        Sweep sweep(*session, layout(model));
        expect_sweep(model, sweep, 4);
        sweep.idle();
    }
}

TEST_F(SweepTest, GivesOutHalfOfItsLookAheadAtOnceWhenItIsThere) {
    FlashModel model(1, 1984);  // whole chunks of 16 cells
    const auto engine = serve(model, 600);
    const auto other = attach(*engine, 400);  // its share is lent to nobody, so the session cannot borrow all cells
    const auto session = attach(*engine, 64);
    Sweep sweep(*session, layout(model));
    expect_sweep(model, sweep, 1);  // from now on all cells are in the pool, and a lease is a grant
    const auto kept = static_cast<uint32_t>(sweep.next(0)->addresses.size() / model.spec.bundles_per_cell);
    ASSERT_LE(kept + 64U, session->lease_limit());
    ASSERT_GT(kept + 64U + 16U, session->lease_limit()) << "as many chunks of 16 cells as can be borrowed";
    const auto leased = [&] { return engine->report().models[0].leases; };
    const auto asked = [&] {
        const weightd::ModelCounts counts = engine->report().models[0].counts;
        return counts.hits + counts.misses;
    };
    wait_until([&] { return asked() == model.spec.cell_count() + 64U; });  // before, last turn's leases may be there
    wait_until([&] { return leased() == kept + 64U; });
    engine->report();  // the loop has answered by then
    EXPECT_EQ(sweep.next(0)->addresses.size(), 32U * model.spec.bundles_per_cell);
    EXPECT_EQ(leased(), kept + 64U) << "nothing was given back yet";
    sweep.idle();
    wait_until([&] { return leased() == 0; });
}

TEST_F(SweepTest, ASweepThroughAModelThatLiesInThePoolSendsNothing) {
    FlashModel model(3, 301);
    const auto engine = serve(model, 600);
    const auto session = attach(*engine, 16);
    Sweep sweep(*session, layout(model));
    expect_sweep(model, sweep, 1);
    wait_until([&] { return engine->report().models[0].slots_leased == model.spec.cell_count(); });
    const uint64_t requests = engine->report().attached[0].requests;
    expect_sweep(model, sweep, 3);
    EXPECT_EQ(sweep.next(0)->addresses.size(), model.spec.layers[0].neurons) << "a whole layer at once";
    EXPECT_EQ(engine->report().attached[0].requests, requests);
    sweep.idle();
    wait_until([&] { return engine->report().models[0].slots_leased == 0; });
    expect_sweep(model, sweep, 2);
}

TEST_F(SweepTest, WhatASweepKeepsIsAtMostTheLimitAndGoesBackWhenItFalls) {
    FlashModel model(3, 301);
    const auto engine = serve(model, 200);
    const auto session = attach(*engine, 16);
    Sweep sweep(*session, layout(model));
    expect_sweep(model, sweep, 2);
    const auto held = [&] { return engine->report().attached[0].leased_cells; };
    const uint32_t alone = session->lease_limit();
    wait_until([&] { return held() > alone - 16U; });
    EXPECT_LE(held(), alone);
    auto other = attach(*engine, 16);
    const uint32_t beside = session->lease_limit();
    ASSERT_LT(beside, alone);
    expect_sweep(model, sweep, 1);
    wait_until([&] { return held() <= beside; });
    other.reset();
    wait_until([&] { return session->lease_limit() == alone; });
    expect_sweep(model, sweep, 2);
    wait_until([&] { return held() > beside; });
}

TEST_F(SweepTest, LooksFurtherAheadWhileTheDeviceRestsBetweenLayers) {
    FlashModel model(2, 1984);
    const auto engine = serve(model, 600);
    const auto session = attach(*engine, 16);
    Sweep sweep(*session, layout(model));
    const auto given_at_once = [&](uint32_t layer) {  // of the chunks that are streamed, when all of them have arrived
        wait_until([&] {
            const weightd::ReadQueue queue = engine->report().read_queue;
            return queue.in_flight + queue.waiting == 0;
        });
        engine->report();  // the loop has answered by then
        uint32_t most = 0, first = 0;
        while (const Sweep::Bundles* chunk = sweep.next(layer)) {
            const auto cells = static_cast<uint32_t>(chunk->addresses.size()) / model.spec.bundles_per_cell;
            if (first++ > 0) most = std::max(most, cells);  // the first are kept
        }
        return most;
    };
    EXPECT_LE(given_at_once(0), 8U) << "half of the share";
    wait_until([&] {
        given_at_once(1);
        return given_at_once(0) > 8U;
    });
    expect_sweep(model, sweep, 2);
    EXPECT_LE(engine->report().attached[0].leased_cells, session->lease_limit());
}

TEST_F(SweepTest, ALayerThatWasLeftBeginsAtItsStart) {
    FlashModel model(2, 301);
    for (const uint32_t slots : {8U, 400U}) {
        const auto engine = serve(model, slots);
        const auto session = attach(*engine, 8);
        Sweep sweep(*session, layout(model));
        expect_sweep(model, sweep, 2);
        ASSERT_NE(sweep.next(0), nullptr);
        sweep.leave();
        expect_sweep(model, sweep, 2);
        ASSERT_NE(sweep.next(1), nullptr);
        sweep.leave();
        ASSERT_EQ(sweep.next(1)->first_position, 0U);
        sweep.leave();
        expect_sweep(model, sweep, 1);
    }
}

TEST_F(SweepTest, SharesThePoolBetweenFourClients) {
    FlashModel model(3, 301);
    const auto engine = serve(model, 120);
    std::vector<std::thread> clients;
    for (int i = 0; i < 4; i++) {
        clients.emplace_back([&] {
            const auto session = attach(*engine, 16);
            Sweep sweep(*session, layout(model));
            expect_sweep(model, sweep, 20);
        });
    }
    for (std::thread& client : clients) client.join();
    wait_until([&] { return engine->report().sessions == 0; });
    EXPECT_EQ(engine->report().models[0].slots_leased, 0U);
}

TEST_F(SweepTest, AScanDoesNotWaitForOneThatSaysNothingMore) {
    FlashModel model(1, 1984);  // whole chunks of 16 cells
    const auto engine = serve(model, 300);
    const auto silent = attach(*engine, 64), session = attach(*engine, 64);
    silent->acquire(0, ring::RANGES, std::array{100U, 132U}, 0);
    Sweep sweep(*session, layout(model));
    expect_sweep(model, sweep, 2);  // nothing else wakes the loop while a read is deferred
}

}  // namespace
