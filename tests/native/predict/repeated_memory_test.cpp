#include "predict/repeated_memory.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

using flashclient::Arrival;
using flashclient::ChunkSource;
using flashclient::RepeatedCells;
using flashclient::RepeatedChunks;
using flashclient::RepeatedMemory;

constexpr uint64_t BEGIN = 1 << 20;

// Layers of 3 and 2 cells, of two bundles each but for the last of the first; the memory has 4 cells.
RepeatedMemory memory() { return {BEGIN, 4, 2, 100, {5, 4}}; }

std::vector<std::pair<uint32_t, std::vector<uint64_t>>> layer_of(RepeatedChunks& chunks, uint32_t layer) {
    std::vector<std::pair<uint32_t, std::vector<uint64_t>>> given;
    const auto use = chunks.use();
    while (const ChunkSource::Bundles* chunk = chunks.next(layer)) {
        given.emplace_back(chunk->first_position, chunk->addresses);
    }
    return given;
}

TEST(RepeatedMemoryTest, CellsOfALaterLayerLieAtTheBeginningAgain) {
    RepeatedChunks chunks(memory(), 3);
    using Given = std::vector<std::pair<uint32_t, std::vector<uint64_t>>>;
    for (int turn = 0; turn < 2; turn++) {
        EXPECT_EQ(layer_of(chunks, 0),
                  (Given{{0, {BEGIN, BEGIN + 100, BEGIN + 200}}, {3, {BEGIN + 300, BEGIN + 400}}}));
        EXPECT_EQ(layer_of(chunks, 1), (Given{{0, {BEGIN + 600, BEGIN + 700, BEGIN}}, {3, {BEGIN + 100}}}));
    }
    EXPECT_THROW(layer_of(chunks, 2), std::out_of_range);
}

TEST(RepeatedMemoryTest, ALayerThatWasLeftBeginsAgain) {
    RepeatedChunks chunks(memory(), 3);
    ASSERT_NE(chunks.next(0), nullptr);
    chunks.leave();
    EXPECT_EQ(chunks.next(0)->first_position, 0);
    ASSERT_NE(chunks.next(1), nullptr);
    EXPECT_EQ(chunks.next(0)->first_position, 0);
}

TEST(RepeatedMemoryTest, CellsThatAreAskedForAreThereAtOnce) {
    RepeatedCells cells(memory());
    cells.exchange(1, {0, 1}, {});
    cells.extend({0}, {1});
    const uint64_t first = BEGIN + 600;
    EXPECT_EQ(cells.arrived(), (std::vector<Arrival>{{0, first}, {1, BEGIN}, {0, first}}));
    cells.exchange(1, {0}, {0});
    EXPECT_EQ(cells.arrived(), (std::vector<Arrival>{{0, BEGIN}}));  // another than in the step before
    EXPECT_TRUE(cells.arrived().empty());
    cells.exchange(0, {2}, {});
    cells.cancel();
    EXPECT_TRUE(cells.arrived().empty());
}

}  // namespace
