#include "engine/loader.h"

#include <gtest/gtest.h>

#include <numeric>

#include "flash_file.h"

namespace weightd {
namespace {

struct LoaderTest : testing::TestWithParam<std::string> {
    FlashModel flash{1, 400};
    std::string note;
    std::unique_ptr<Reader> reader = make_reader(GetParam(), 8, 32, note);
    Verifier verifier{1};
    Loader loader{*reader, verifier};
    DirectFile file{flash.spec.bundles_path, false};
    Pool pool{flash.spec.cell_count(), flash.spec.cell_bytes};

    LoaderTest() { pool.add_segment(0, {"test", size_t{100} * flash.spec.cell_bytes}); }

    // Reads those of `cells` that are not in the pool.
    LoadCounts load(const std::vector<uint32_t>& cells) {
        std::vector<Missing> missing;
        for (const uint32_t cell : cells) {
            if (pool.find(cell)) continue;
            const Place place = pool.insert(cell);
            missing.push_back({cell, place, pool.address(place)});
        }
        const LoadCounts counts = loader.load({0, &flash.spec, &file, -1}, missing);
        std::vector<Loaded> loaded;
        while (loader.busy()) loader.reap(loaded);
        EXPECT_EQ(loaded.size(), missing.size());
        for (const Loaded& one : loaded) {
            EXPECT_EQ(one.error, 0);
            EXPECT_EQ(one.wrong_bundle, -1) << one.cell;
            pool.loaded(one.place);
        }
        return counts;
    }

    void expect_whole(const std::vector<uint32_t>& cells) {
        for (const uint32_t cell : cells) {
            EXPECT_EQ(std::memcmp(pool.address(pool.find(cell)), flash.cell(0, cell), 4096), 0) << cell;
        }
    }

    static std::vector<uint32_t> numbers(uint32_t begin, uint32_t end) {
        std::vector<uint32_t> cells(end - begin);
        std::iota(cells.begin(), cells.end(), begin);
        return cells;
    }
};

TEST_P(LoaderTest, ReadsThroughASmallGapAndDropsItsBytes) {
    load({15, 24, 25});
    // The cell is in the pool, so bytes of it that are read now must not matter.
    flip_byte(flash.spec.bundles_path, 15 * 4096 + 8);
    const LoadCounts counts = load(numbers(6, 40));
    EXPECT_EQ(counts.reads, 1U);
    EXPECT_EQ(counts.read_bytes, 34U * 4096) << "gaps included";
    expect_whole(numbers(6, 40));
}

TEST_P(LoaderTest, ReadsThroughNoLargeGapAndNoneForAFewCells) {
    EXPECT_EQ(load({2, 4, 6}).reads, 3U);
    load(numbers(30, 35));
    const LoadCounts counts = load(numbers(10, 50));
    EXPECT_EQ(counts.reads, 2U) << "20 KiB lie between";
    EXPECT_EQ(counts.read_bytes, 35U * 4096);
    expect_whole(numbers(10, 50));
}

INSTANTIATE_TEST_SUITE_P(Readers, LoaderTest, testing::Values("auto", "threads"));

}  // namespace
}  // namespace weightd
