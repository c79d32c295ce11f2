#include "pool/cell_replacement.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <list>
#include <random>
#include <set>

namespace weightd {
namespace {

// Uses the policy as the engine does. use() returns whether the cell was in the pool.
class Player {
  public:
    Player(uint32_t cells, uint32_t slots) : policy_(cells), slots_(slots) {}
    void seed(const std::vector<Hotness>& hotness) { policy_.seed(hotness); }

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
    CellReplacement policy_;
    uint32_t slots_;
    std::set<uint32_t> present_;
};

// The sums of the definition in floating point, and which cells are probationary by them. Where two sums are closer to
// each other than TOLERANCE, the policy decides.
class PlainSums {
  public:
    static constexpr double TOLERANCE = 0.15;  // octaves

    explicit PlainSums(uint32_t cells) : sums_(cells), probationary_(cells), touches_per_half_life_(2 * cells) {}

    void inserted(uint32_t cell, bool contested, const std::set<uint32_t>& unpinned, bool probationary) {
        double least = 99;
        for (const uint32_t other : unpinned) {
            if (!probationary_[other]) least = std::min(least, octaves(other));
        }
        const double above = octaves(cell) - least;
        if (!contested || above > 2 * TOLERANCE) {
            EXPECT_FALSE(probationary);
        } else if (above < -TOLERANCE) {
            EXPECT_TRUE(probationary);
        }
        probationary_[cell] = probationary;
    }
    void touched(uint32_t cell) {
        for (double& sum : sums_) sum *= std::exp2(-1 / touches_per_half_life_);
        sums_[cell] += 1;
    }
    double octaves(uint32_t cell) const { return std::log2(std::max(sums_[cell], std::exp2(-15.0))); }
    bool probationary(uint32_t cell) const { return probationary_[cell]; }

  private:
    std::vector<double> sums_;
    std::vector<bool> probationary_;
    double touches_per_half_life_;
};

void expect_right_victim(const PlainSums& plain, uint32_t gone, const std::set<uint32_t>& unpinned) {
    if (plain.probationary(gone)) return;
    for (const uint32_t other : unpinned) {
        ASSERT_FALSE(plain.probationary(other)) << "an admitted cell was evicted before a probationary one";
        ASSERT_LE(plain.octaves(gone), plain.octaves(other) + PlainSums::TOLERANCE);
    }
}

TEST(CellReplacement, EvictsProbationaryCellsThenTheOneWithTheLeastRecentUses) {
    const uint32_t cells = 256;
    CellReplacement policy(cells);
    PlainSums plain(cells);
    std::mt19937 random(11);
    std::geometric_distribution<uint32_t> skewed(0.03);
    std::set<uint32_t> pinned;
    std::set<uint32_t> unpinned;
    uint32_t kept_victims = 0;
    uint32_t probationary_victims = 0;
    for (uint32_t step = 0; step < 120'000; step++) {  // enough half-lives for the scores' zero to move three times
        const uint32_t cell = (skewed(random) + step / 20'000 * 40) % cells;
        const bool contested = pinned.size() + unpinned.size() == 64;
        if (contested && !pinned.contains(cell) && !unpinned.contains(cell)) {
            const uint32_t gone = policy.victim();
            ASSERT_EQ(unpinned.erase(gone), 1U);
            expect_right_victim(plain, gone, unpinned);
            (plain.probationary(gone) ? probationary_victims : kept_victims)++;
        }
        if (unpinned.erase(cell) == 1) {
            policy.pinned(cell);
        } else if (!pinned.contains(cell)) {
            policy.inserted(cell, contested);
            plain.inserted(cell, contested, unpinned, policy.probationary(cell));
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
    EXPECT_GT(probationary_victims, 1000U);
}

TEST(CellReplacement, HasNoVictimWhenAllArePinned) {
    CellReplacement policy(3);
    policy.inserted(1, false);
    policy.inserted(2, false);
    EXPECT_EQ(policy.victim(), NO_CELL);
    policy.unpinned(2);
    EXPECT_EQ(policy.victim(), 2U);
    EXPECT_EQ(policy.victim(), NO_CELL);
}

TEST(CellReplacement, KeepsSeededCellsFromTheirFirstUse) {
    const uint32_t cells = 2560;
    std::vector<Hotness> expected(cells, HOTNESS_MEAN - 20);
    for (uint32_t cell = 0; cell < cells; cell += 10) expected[cell] = HOTNESS_MEAN + 20;
    Player player(cells, 300);
    player.seed(expected);
    for (uint32_t cell = 0; cell < cells; cell += 10) player.use(cell);
    std::mt19937 random(4);
    for (int i = 0; i < 400; i++) player.use(random() % cells);  // many cells that are seldom used, once each
    uint32_t hits = 0;
    for (uint32_t cell = 0; cell < cells; cell += 10) hits += player.use(cell);
    EXPECT_EQ(hits, 256U);
}

TEST(CellReplacement, ANewSeedReordersTheCellsInThePool) {
    CellReplacement policy(4);
    for (uint32_t cell = 0; cell < 4; cell++) {
        policy.inserted(cell, false);
        for (uint32_t i = 0; i < 2 + cell; i++) policy.touched(cell);
        if (cell > 0) policy.unpinned(cell);
    }
    policy.seed(std::vector<Hotness>{1, 120, 60, 30});
    EXPECT_EQ(policy.victim(), 3U);
    EXPECT_EQ(policy.victim(), 2U);
    policy.unpinned(0);
    EXPECT_EQ(policy.victim(), 0U);
    EXPECT_EQ(policy.victim(), 1U);
}

TEST(CellReplacement, ForgetsAWrongSeed) {
    std::vector<Hotness> expected(2560, HOTNESS_MEAN - 20);
    for (uint32_t cell = 0; cell < 256; cell++) expected[cell] = HOTNESS_MEAN + 20;
    Player player(2560, 300);
    player.seed(expected);
    std::mt19937 random(4);
    for (int i = 0; i < 4 * 2 * 2560; i++) player.use(1000 + random() % 250);  // four half-lives
    uint32_t hits = 0;
    for (uint32_t cell = 1000; cell < 1250; cell++) hits += player.use(cell);
    EXPECT_GT(hits, 245U);
}

TEST(CellReplacement, WritesWhatItHasLearnedAsASeed) {
    const uint32_t cells = 1024;
    CellReplacement teacher(cells);
    std::mt19937 random(9);
    for (uint32_t cell = 0; cell < cells; cell++) teacher.inserted(cell, false);
    for (uint32_t i = 0; i < 200'000; i++) teacher.touched(i % 8 == 0 ? random() % 990 : 100 + random() % 90);
    std::vector<Hotness> learned(cells);
    teacher.write_hotness(learned);
    EXPECT_EQ(learned[995], 0) << "never used";
    EXPECT_GT(learned[500], 0);
    for (uint32_t cell = 100; cell < 190; cell++) {
        // its uses divided by the mean: such a cell has (7/8) / 90 + (1/8) / 990 of all uses, times 1024 cells
        EXPECT_NEAR(learned[cell], HOTNESS_MEAN + 8 * std::log2(10.1), 6.0);
    }
    std::vector<Hotness> again(cells);
    CellReplacement pupil(cells);
    pupil.seed(learned);
    pupil.write_hotness(again);
    EXPECT_EQ(again, learned);
}

TEST(CellReplacement, HitsHalfOfACyclicScanOverTwiceThePool) {
    Player player(1000, 500);
    uint32_t hits = 0;
    for (int turn = 0; turn < 10; turn++) {
        for (uint32_t cell = 0; cell < 1000; cell++) hits += player.use(cell) && turn >= 2;
    }
    EXPECT_GT(hits / 8000.0, 0.48);  // Belady's optimum: 0.4995
}

TEST(CellReplacement, HitsAsOftenInScansThatFollowEachOtherAsInOne) {
    const uint32_t cells = 1000;
    const uint32_t behind = 20;  // the last scan is so far behind; a cell is leased until it has passed
    CellReplacement policy(cells);
    std::set<uint32_t> present;
    uint32_t hits = 0;
    for (uint32_t step = 0; step < 10 * cells; step++) {
        const uint32_t cell = step % cells;
        if (present.contains(cell)) {
            hits += step >= 2 * cells;
            policy.pinned(cell);
        } else {
            const bool contested = present.size() == cells / 2;
            if (contested) {
                ASSERT_EQ(present.erase(policy.victim()), 1U);
            }
            policy.inserted(cell, contested);
            present.insert(cell);
        }
        policy.touched(cell);
        for (const uint32_t distance : {3U, 7U, behind}) {
            if (step >= distance) policy.touched((step - distance) % cells);
        }
        if (step >= behind) policy.unpinned((step - behind) % cells);
    }
    EXPECT_GT(hits / (8.0 * cells), 0.46);  // 0.48 of the cells are in the pool and not leased
}

// Scans of one model that pause at random. Each asks for some cells ahead, and the device reads one cell at a time.
class StopAndGo {
  public:
    StopAndGo(uint32_t cells, uint32_t slots, uint32_t scans)
        : cells_(cells), slots_(slots), policy_(cells), states_(cells), pins_(cells), scans_(scans) {
        policy_.retain_probationary(scans > 1);
    }

    double reads_per_turn(uint32_t turns) {
        while (std::any_of(scans_.begin(), scans_.end(), [&](const Scan& scan) { return scan.at < turns * cells_; })) {
            if (!queue_.empty()) finish_read();
            std::shuffle(scans_.begin(), scans_.end(), random_);
            for (Scan& scan : scans_) move(scan, turns * cells_);
            now_++;
        }
        return static_cast<double>(reads_) / turns / cells_;
    }

  private:
    static constexpr uint32_t AHEAD = 100;
    enum State : uint8_t { ABSENT, READING, THERE };
    struct Scan {
        uint32_t at = 0;
        uint32_t asked = 0;
        uint32_t rests_until = 0;
    };

    void finish_read() {
        const uint32_t cell = queue_.front();
        queue_.pop_front();
        states_[cell] = THERE;
        if (pins_[cell] == 0) policy_.unpinned(cell);
    }
    bool ask(uint32_t cell) {
        if (states_[cell] == ABSENT) {
            const bool contested = present_ == slots_;
            if (contested) {
                const uint32_t gone = policy_.victim();
                if (gone == NO_CELL) return false;
                states_[gone] = ABSENT;
                present_--;
            }
            policy_.inserted(cell, contested);
            states_[cell] = READING;
            present_++;
            reads_++;
            queue_.push_back(cell);
        } else if (pins_[cell] == 0 && states_[cell] == THERE) {
            policy_.pinned(cell);
        }
        pins_[cell]++;
        policy_.touched(cell);
        return true;
    }
    void move(Scan& scan, uint32_t end) {
        if (random_() % 700 == 0) scan.rests_until = now_ + random_() % 300;
        if (now_ < scan.rests_until) return;
        for (uint32_t moves = random_() % 40; moves > 0 && scan.at < end; moves--) {
            while (scan.asked < std::min(scan.at + AHEAD, end) && ask(scan.asked % cells_)) scan.asked++;
            const uint32_t cell = scan.at % cells_;
            if (scan.asked == scan.at || states_[cell] != THERE) return;
            if (--pins_[cell] == 0) policy_.unpinned(cell);
            scan.at++;
        }
    }

    uint32_t cells_;
    uint32_t slots_;
    CellReplacement policy_;
    std::vector<State> states_;
    std::vector<uint32_t> pins_;
    std::vector<Scan> scans_;
    std::deque<uint32_t> queue_;
    std::mt19937 random_{3};
    uint32_t present_ = 0;
    uint32_t reads_ = 0;
    uint32_t now_ = 0;
};

TEST(CellReplacement, BringsTogetherScansThatDriftApart) {
    for (const uint32_t slots : {3'000U, 10'000U}) {
        const double alone = StopAndGo(20'000, slots, 1).reads_per_turn(8);
        EXPECT_LT(alone, 1.08 - slots / 20'000.0);  // of the cells, the first turn included
        for (const uint32_t scans : {2U, 4U, 8U}) {
            const double together = StopAndGo(20'000, slots, scans).reads_per_turn(8);
            EXPECT_LT(together, 1.12 * alone) << scans << " scans";
        }
    }
}

TEST(CellReplacement, HitsWhatFitsOfACyclicScanWhateverThePoolHeldBefore) {
    Player player(1000, 850);
    std::mt19937 random(2);
    for (int i = 0; i < 20'000; i++) player.use(random() % 100);      // a few cells are used often,
    for (uint32_t cell = 300; cell < 1000; cell++) player.use(cell);  // then the pool is filled from mid-cycle
    uint32_t hits = 0;
    for (int turn = 0; turn < 20; turn++) {
        for (uint32_t cell = 0; cell < 1000; cell++) hits += player.use(cell) && turn >= 10;
    }
    EXPECT_GT(hits / 10'000.0, 0.83);  // 0.849
}

TEST(CellReplacement, KeepsTheHotSetThroughAScan) {
    Player player(10'000, 300);
    std::mt19937 random(1);
    for (int i = 0; i < 20'000; i++) player.use(random() % 250);
    for (uint32_t cell = 1000; cell < 9000; cell++) player.use(cell);
    uint32_t hits = 0;
    for (int i = 0; i < 1000; i++) hits += player.use(random() % 250);
    EXPECT_GT(hits, 950U);
}

TEST(CellReplacement, ComesCloseToTheBestOnASkewedTrace) {
    // Uses are independent, with p ~ 1/rank. The best policy holds the most frequent cells.
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

TEST(CellReplacement, AdaptsToManyLeasedCells) {
    // A scan keeps a fifth of the pool leased ahead. Its probationary cells must not evict the rest.
    const uint32_t cells = 1000;
    const uint32_t slots = 500;
    const uint32_t ahead = 100;
    CellReplacement policy(cells);
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
