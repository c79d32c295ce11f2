// Rows of a table, whatever is asked for and however their cells arrive.
#include "tables/row_copy.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <set>

#include "kernels/readable_memory.h"
#include "predict/cells.h"

namespace flashclient {
namespace {

constexpr uint32_t PER_CELL = 3, STRIDE_BYTES = 24;  // of a row of 20 bytes
constexpr size_t ROW_BYTES = 20, ROWS = 20;          // the last cell is not full
constexpr size_t TABLE_BYTES = ROWS * STRIDE_BYTES;

struct RowCopyTest : testing::Test {
    std::vector<uint8_t> table = std::vector<uint8_t>(TABLE_BYTES);
    ReadableMemory readable{table.data(), TABLE_BYTES - (STRIDE_BYTES - ROW_BYTES)};  // up to the end of the last row
    TestCells cells;
    CellWalk walk{cells, {PER_CELL, STRIDE_BYTES}};

    RowCopyTest() {
        std::mt19937 random(5);
        std::generate(table.begin(), table.end(), [&] { return static_cast<uint8_t>(random()); });
        cells.one_by_one = true;  // the last that was asked for arrives first
        cells.address = [this](uint32_t, uint32_t cell) {
            return reinterpret_cast<uint64_t>(table.data()) + uint64_t{cell} * PER_CELL * STRIDE_BYTES;
        };
    }

    std::vector<uint8_t> copied(const std::vector<uint32_t>& rows) {
        std::vector<uint8_t> out(rows.size() * ROW_BYTES + 1, 0xee);
        copy_rows(walk, rows, ROW_BYTES, reinterpret_cast<std::byte*>(out.data()));
        EXPECT_EQ(out.back(), 0xee) << "written past the end";
        out.pop_back();
        return out;
    }

    std::vector<uint8_t> expected(const std::vector<uint32_t>& rows) const {
        std::vector<uint8_t> out;
        for (const uint32_t row : rows) {
            const auto begin = table.begin() + row * STRIDE_BYTES;
            out.insert(out.end(), begin, begin + ROW_BYTES);
        }
        return out;
    }
};

TEST_F(RowCopyTest, CopiesRowsInAnyOrderAndAgain) {
    const std::vector<uint32_t> rows{19, 0, 7, 7, 1, 19, 2, 18, 0};
    EXPECT_EQ(copied(rows), expected(rows));
    EXPECT_TRUE(cells.held.empty());
}

TEST_F(RowCopyTest, AsksForEachCellOnce) {
    copied({8, 6, 1, 7, 6, 2});
    const std::set<uint32_t> asked(cells.asked_for.begin(), cells.asked_for.end());
    EXPECT_EQ(asked, (std::set<uint32_t>{0, 2}));
    EXPECT_EQ(cells.asked_for.size(), 2U);
}

TEST_F(RowCopyTest, CopiesNothingForNoRows) {
    EXPECT_TRUE(copied({}).empty());
    EXPECT_TRUE(cells.held.empty());
    EXPECT_TRUE(cells.asked_for.empty());
}

TEST_F(RowCopyTest, CopiesMoreRowsThanMayBeLeasedAtOnce) {
    cells.share = cells.limit = 2;
    std::vector<uint32_t> rows(200);
    std::mt19937 random(6);
    for (uint32_t& row : rows) row = random() % ROWS;
    EXPECT_EQ(copied(rows), expected(rows));
    EXPECT_EQ(cells.held_most, 2U);
    EXPECT_TRUE(cells.held.empty());
}

TEST_F(RowCopyTest, ARefusedCellComesLater) {
    cells.refusals = 3;
    std::vector<uint32_t> rows(ROWS);
    std::iota(rows.begin(), rows.end(), 0U);
    EXPECT_EQ(copied(rows), expected(rows));
    EXPECT_TRUE(cells.held.empty());
}

TEST_F(RowCopyTest, ACellOutsideOfReadableMemoryIsRefused) {
    std::vector<uint8_t> elsewhere(TABLE_BYTES);
    const auto right = cells.address;
    cells.address = [&](uint32_t layer, uint32_t cell) {
        return cell == 1 ? reinterpret_cast<uint64_t>(elsewhere.data()) : right(layer, cell);
    };
    EXPECT_THROW(copied({0, 4, 9}), std::invalid_argument);
    cells.address = right;
    EXPECT_EQ(copied({4}), expected({4})) << "the next lookup gives back what the failed one leased";
    EXPECT_TRUE(cells.held.empty());
}

TEST_F(RowCopyTest, ALossIsPassedOnAndTheNextLookupIsWhole) {
    cells.lost_after = 1;
    EXPECT_THROW(copied({0, 4, 9, 15}), std::runtime_error);
    cells.lost_after = 1'000'000;
    walk.forget();
    cells.cancel();
    cells.held.clear();
    EXPECT_EQ(copied({9, 0, 15}), expected({9, 0, 15}));
    EXPECT_TRUE(cells.held.empty());
}

}  // namespace
}  // namespace flashclient
