#include "pool.h"

#include <gtest/gtest.h>

#include <cmath>
#include <list>
#include <random>
#include <set>

namespace weightd {
namespace {

constexpr uint32_t CELL_BYTES = 4096;

SharedMemory segment(uint32_t slots) { return {"test", size_t{slots} * CELL_BYTES}; }

// A reference: the same calls on a pool and on plain sets; the invariants of pool.h after each.
TEST(Pool, KeepsItsInvariantsUnderRandomUse) {
    std::mt19937 random(3);
    Pool pool(200, CELL_BYTES);
    uint32_t segments = 0;
    pool.add_segment(segments++, segment(20));
    std::multiset<uint32_t> leased;
    std::set<uint32_t> reading;
    for (int step = 0; step < 50'000; step++) {
        const uint32_t cell = random() % 200;
        const Place place = pool.find(cell);
        if (place) {
            ASSERT_EQ(place.slot().cell, cell);
        }
        switch (random() % 8) {
            case 0:
            case 1:
            case 2: {
                if (place) {
                    if (!place.slot().reading) pool.touched(cell);
                    break;
                }
                const Place got = pool.insert(cell);
                if (got) reading.insert(cell);
                ASSERT_TRUE(got || leased.size() + reading.size() > 0);
                break;
            }
            case 3:
                if (reading.erase(cell) == 1) pool.loaded(place);
                break;
            case 4:
                if (place && leased.size() < 10) {
                    pool.lease(place);
                    leased.insert(cell);
                }
                break;
            case 5:
            case 6:
                if (const auto held = leased.find(cell); held != leased.end()) {
                    leased.erase(held);
                    pool.unlease(place);
                }
                break;
            case 7:
                if (step % 500 == 7 && pool.slots() < 60) pool.add_segment(segments++, segment(10 + random() % 10));
                if (step % 500 == 263 && pool.slots() > 30) pool.start_draining();
                pool.retire_drained();
                break;
        }
        for (const uint32_t held : leased) ASSERT_TRUE(pool.find(held)) << "a leased cell left the pool";
        for (const uint32_t unread : reading) ASSERT_TRUE(pool.find(unread)) << "a cell left while it was being read";
        std::set<uint32_t> busy(leased.begin(), leased.end());
        busy.insert(reading.begin(), reading.end());
        ASSERT_EQ(pool.busy(), busy.size());
    }
    EXPECT_GT(pool.evictions(), 100U);
    EXPECT_GT(segments, 5U);
}

TEST(Pool, GivesBackADrainedSegmentWhenItsLastLeaseEnds) {
    Pool pool(10, CELL_BYTES);
    pool.add_segment(0, segment(4));
    const Place place = pool.insert(3);
    pool.lease(place);
    pool.loaded(place);
    ASSERT_TRUE(pool.start_draining());
    EXPECT_TRUE(pool.retire_drained().empty());
    EXPECT_FALSE(pool.insert(4)) << "a draining segment takes nothing new";
    pool.unlease(place);
    EXPECT_EQ(pool.retire_drained().size(), 1U);
    EXPECT_FALSE(pool.find(3));
}

TEST(Pool, NeverEvictsWhatIsLeased) {
    Pool pool(10, CELL_BYTES);
    pool.add_segment(0, segment(2));
    for (const uint32_t cell : {0U, 1U}) {
        const Place place = pool.insert(cell);
        pool.lease(place);
        pool.loaded(place);
    }
    EXPECT_FALSE(pool.insert(2));
    pool.unlease(pool.find(0));
    EXPECT_TRUE(pool.insert(2));
    EXPECT_FALSE(pool.find(0));
    EXPECT_TRUE(pool.find(1));
}

TEST(Pool, TellsWhatItHoldsFromWhatItHeld) {
    Pool pool(3, CELL_BYTES);
    pool.add_segment(0, segment(1));
    for (const uint32_t cell : {0U, 1U}) {
        const Place place = pool.insert(cell);
        pool.touched(cell);
        pool.loaded(place);
    }
    std::vector<Hotness> hotness(3);
    pool.write_hotness(hotness);
    EXPECT_GT(hotness[0], 0);
    EXPECT_EQ(hotness[0] & HOTNESS_IN_POOL, 0);
    EXPECT_EQ(hotness[1] & HOTNESS_IN_POOL, HOTNESS_IN_POOL);
    EXPECT_EQ(hotness[1] & HOTNESS_MAX, hotness[0]);
    EXPECT_EQ(hotness[2], 0);
}

// Plays a trace on the policy as the engine would; returns the share of hits.
class Player {
  public:
    Player(uint32_t cells, uint32_t slots) : policy_(cells), slots_(slots) {}
    void expect(const std::vector<Hotness>& hotness) { policy_.expect(hotness); }

    bool use(uint32_t cell) {
        if (present_.contains(cell)) {
            policy_.touched(cell);
            return true;
        }
        const bool contested = present_.size() == slots_;
        if (contested) {
            const uint32_t gone = policy_.victim();
            EXPECT_EQ(present_.erase(gone), 1U);
        }
        policy_.inserted(cell, contested);
        policy_.touched(cell);
        policy_.unpinned(cell);
        present_.insert(cell);
        return false;
    }

  private:
    Replacement policy_;
    uint32_t slots_;
    std::set<uint32_t> present_;
};

// The sums themselves, in floating point, over all uses that there were; and what can be said with certainty, within
// TOLERANCE, of who is passing.
class PlainSums {
  public:
    static constexpr double TOLERANCE = 0.15;  // octaves
    enum class Passing { no, maybe, yes };

    explicit PlainSums(uint32_t cells)
        : sums_(cells), passing_(cells), fresh_(cells), touches_per_half_life_(2 * cells) {}

    void inserted(uint32_t cell, bool contested, const std::set<uint32_t>& unpinned) {
        double least = 99;
        for (const uint32_t other : unpinned) {
            if (passing_[other] == Passing::no) least = std::min(least, octaves(other));
            unsure_ = unsure_ || passing_[other] == Passing::maybe;
        }
        const double above = octaves(cell) - least;
        passing_[cell] = !contested || above > 2 * TOLERANCE ? Passing::no : Passing::maybe;
        if (contested && above < -TOLERANCE && !unsure_) passing_[cell] = Passing::yes;
        unsure_ = false;
        fresh_[cell] = true;
    }
    void touched(uint32_t cell) {
        for (double& sum : sums_) sum *= std::exp2(-1 / touches_per_half_life_);
        sums_[cell] += 1;
        if (!fresh_[cell]) passing_[cell] = Passing::no;
        fresh_[cell] = false;
    }
    double octaves(uint32_t cell) const { return std::log2(std::max(sums_[cell], std::exp2(-15.0))); }
    Passing passing(uint32_t cell) const { return passing_[cell]; }

  private:
    std::vector<double> sums_;
    std::vector<Passing> passing_;
    std::vector<bool> fresh_;
    bool unsure_ = false;
    double touches_per_half_life_;
};

void expect_right_victim(const PlainSums& plain, uint32_t gone, const std::set<uint32_t>& unpinned) {
    using Passing = PlainSums::Passing;
    if (plain.passing(gone) != Passing::no) return;
    for (const uint32_t other : unpinned) {
        ASSERT_NE(plain.passing(other), Passing::yes) << "one that is kept went before one that is passing";
        if (plain.passing(other) == Passing::no) {
            ASSERT_LE(plain.octaves(gone), plain.octaves(other) + PlainSums::TOLERANCE);
        }
    }
}

TEST(Replacement, TakesWhoIsPassingThenTheCellWithTheLeastAgedUses) {
    const uint32_t cells = 256;
    Replacement policy(cells);
    PlainSums plain(cells);
    std::mt19937 random(11);
    std::geometric_distribution<uint32_t> skewed(0.03);
    std::set<uint32_t> pinned;
    std::set<uint32_t> unpinned;
    uint32_t kept_victims = 0;
    uint32_t passing_victims = 0;
    for (uint32_t step = 0; step < 120'000; step++) {  // half-lives enough for the scores' zero to move three times
        const uint32_t cell = (skewed(random) + step / 20'000 * 40) % cells;
        const bool contested = pinned.size() + unpinned.size() == 64;
        if (contested && !pinned.contains(cell) && !unpinned.contains(cell)) {
            const uint32_t gone = policy.victim();
            ASSERT_EQ(unpinned.erase(gone), 1U);
            expect_right_victim(plain, gone, unpinned);
            kept_victims += plain.passing(gone) == PlainSums::Passing::no;
            passing_victims += plain.passing(gone) == PlainSums::Passing::yes;
        }
        if (unpinned.erase(cell) == 1) {
            policy.pinned(cell);
        } else if (!pinned.contains(cell)) {
            policy.inserted(cell, contested);
            plain.inserted(cell, contested, unpinned);
        }
        pinned.insert(cell);
        policy.touched(cell);
        plain.touched(cell);
        while (pinned.size() > random() % 8) {
            const uint32_t given = *pinned.begin();
            pinned.erase(pinned.begin());
            policy.unpinned(given);
            unpinned.insert(given);
        }
    }
    EXPECT_GT(kept_victims, 1000U);
    EXPECT_GT(passing_victims, 1000U);
}

TEST(Replacement, HasNoVictimWhenAllArePinned) {
    Replacement policy(3);
    policy.inserted(1, false);
    policy.inserted(2, false);
    EXPECT_EQ(policy.victim(), NO_CELL);
    policy.unpinned(2);
    EXPECT_EQ(policy.victim(), 2U);
    EXPECT_EQ(policy.victim(), NO_CELL);
}

TEST(Replacement, KeepsWhatCalibrationForetellsFromTheFirstUseOn) {
    const uint32_t cells = 2560;
    std::vector<Hotness> expected(cells, HOTNESS_MEAN - 20);
    for (uint32_t cell = 0; cell < cells; cell += 10) expected[cell] = HOTNESS_MEAN + 20;
    Player player(cells, 300);
    player.expect(expected);
    for (uint32_t cell = 0; cell < cells; cell += 10) player.use(cell);
    std::mt19937 random(4);
    for (int i = 0; i < 400; i++) player.use(random() % cells);  // many that are seldom used, once
    uint32_t hits = 0;
    for (uint32_t cell = 0; cell < cells; cell += 10) hits += player.use(cell);
    EXPECT_EQ(hits, 256U);
}

TEST(Replacement, ReordersWhatIsInThePoolByANewExpectation) {
    Replacement policy(4);
    for (uint32_t cell = 0; cell < 4; cell++) {
        policy.inserted(cell, false);
        for (uint32_t i = 0; i < 2 + cell; i++) policy.touched(cell);
        if (cell > 0) policy.unpinned(cell);
    }
    policy.expect(std::vector<Hotness>{1, 120, 60, 30});
    EXPECT_EQ(policy.victim(), 3U);
    EXPECT_EQ(policy.victim(), 2U);
    policy.unpinned(0);
    EXPECT_EQ(policy.victim(), 0U);
    EXPECT_EQ(policy.victim(), 1U);
}

TEST(Replacement, ForgetsWhatCalibrationForetoldWrongly) {
    std::vector<Hotness> expected(2560, HOTNESS_MEAN - 20);
    for (uint32_t cell = 0; cell < 256; cell++) expected[cell] = HOTNESS_MEAN + 20;
    Player player(2560, 300);
    player.expect(expected);
    std::mt19937 random(4);
    for (int i = 0; i < 4 * 2 * 2560; i++) player.use(1000 + random() % 250);  // four half-lives
    uint32_t hits = 0;
    for (uint32_t cell = 1000; cell < 1250; cell++) hits += player.use(cell);
    EXPECT_GT(hits, 245U);
}

TEST(Replacement, HandsOverWhatItHasLearned) {
    const uint32_t cells = 1024;
    Replacement teacher(cells);
    std::mt19937 random(9);
    for (uint32_t cell = 0; cell < cells; cell++) teacher.inserted(cell, false);
    for (uint32_t i = 0; i < 200'000; i++) teacher.touched(i % 8 == 0 ? random() % 990 : 100 + random() % 90);
    std::vector<Hotness> learned(cells);
    teacher.write_hotness(learned);
    EXPECT_EQ(learned[995], 0) << "never used";
    EXPECT_GT(learned[500], 0);
    for (uint32_t cell = 100; cell < 190; cell++) {
        // uses of such a cell by those of the mean: (7/8) / 90 and (1/8) / 990 of all, times 1024
        EXPECT_NEAR(learned[cell], HOTNESS_MEAN + 8 * std::log2(10.1), 6.0);
    }
    std::vector<Hotness> again(cells);
    Replacement pupil(cells);
    pupil.expect(learned);
    pupil.write_hotness(again);
    EXPECT_EQ(again, learned);
}

TEST(Replacement, FindsHalfOfACyclicScanOverTwiceThePool) {
    Player player(1000, 500);
    uint32_t hits = 0;
    for (int turn = 0; turn < 10; turn++) {
        for (uint32_t cell = 0; cell < 1000; cell++) hits += player.use(cell) && turn >= 2;
    }
    EXPECT_GT(hits / 8000.0, 0.48);  // Belady's: 0.4995
}

TEST(Replacement, FindsWhatFitsOfACyclicScanWhateverWasThereBefore) {
    Player player(1000, 850);
    std::mt19937 random(2);
    for (int i = 0; i < 20'000; i++) player.use(random() % 100);      // little is used often,
    for (uint32_t cell = 300; cell < 1000; cell++) player.use(cell);  // the rest is filled from the middle
    uint32_t hits = 0;
    for (int turn = 0; turn < 20; turn++) {
        for (uint32_t cell = 0; cell < 1000; cell++) hits += player.use(cell) && turn >= 10;
    }
    EXPECT_GT(hits / 10'000.0, 0.83);  // 0.849
}

TEST(Replacement, KeepsTheHotSetThroughAScan) {
    Player player(10'000, 300);
    std::mt19937 random(1);
    for (int i = 0; i < 20'000; i++) player.use(random() % 250);
    for (uint32_t cell = 1000; cell < 9000; cell++) player.use(cell);
    uint32_t hits = 0;
    for (int i = 0; i < 1000; i++) hits += player.use(random() % 250);
    EXPECT_GT(hits, 950U);
}

TEST(Replacement, ComesCloseToTheBestOnASkewedTrace) {
    // independent uses with p ~ 1/rank: the best that any policy can do is to hold the most frequent cells
    std::mt19937 random(5);
    std::vector<double> weights;
    for (int i = 1; i <= 2000; i++) weights.push_back(1.0 / i);
    std::discrete_distribution<uint32_t> cells(weights.begin(), weights.end());
    Player player(2000, 400);
    uint32_t hits = 0;
    uint32_t best = 0;
    for (int i = 0; i < 200'000; i++) {
        const uint32_t cell = cells(random);
        const bool hit = player.use(cell);
        if (i < 50'000) continue;
        hits += hit;
        best += cell < 400;
    }
    EXPECT_GT(hits / 150'000.0, best / 150'000.0 - 0.05);
}

TEST(Replacement, AdaptsToMuchThatIsLeased) {
    // a sweep that keeps a fifth of the pool leased ahead: what passes through must not push out the rest
    const uint32_t cells = 1000;
    const uint32_t slots = 500;
    const uint32_t ahead = 100;
    Replacement policy(cells);
    std::set<uint32_t> present;
    std::list<uint32_t> leased;
    uint32_t hits = 0;
    for (uint32_t turn = 0; turn < 12; turn++) {
        for (uint32_t cell = 0; cell < cells; cell++) {
            if (leased.size() == ahead) {
                policy.unpinned(leased.front());
                leased.pop_front();
            }
            if (present.contains(cell)) {
                hits += turn >= 4;
                policy.pinned(cell);
            } else {
                const bool contested = present.size() == slots;
                if (contested) {
                    const uint32_t gone = policy.victim();
                    ASSERT_NE(gone, NO_CELL);
                    ASSERT_EQ(present.erase(gone), 1U);
                }
                policy.inserted(cell, contested);
                present.insert(cell);
            }
            policy.touched(cell);
            leased.push_back(cell);
        }
    }
    EXPECT_GT(hits / 8000.0, 0.37);  // 400 of the slots can be useful
}

}  // namespace
}  // namespace weightd
