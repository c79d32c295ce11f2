// Scans of one model come together, and no scan is deferred for long.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <numeric>

#include "engine/engine.h"
#include "flash_file.h"
#include "memory/model_cost.h"

namespace weightd {
namespace {

constexpr uint32_t CELL_BYTES = 4096;
constexpr uint32_t CELLS = 8192;
constexpr uint32_t CHUNK = 32;                        // cells of one request
constexpr std::chrono::microseconds CHUNK_TIME{680};  // the device reads a chunk in this time
constexpr uint32_t AHEAD = 32;                        // chunks that a scan asks for before it needs them

// Reads only when the test says so, in the order of the requests.
class ToldReader final : public Reader {
  public:
    explicit ToldReader(const std::vector<std::byte>& file) : file_(file) {}
    void read(uint64_t cells) {
        cells_read.clear();
        for (uint64_t left_bytes = cells * CELL_BYTES; left_bytes > 0 && !asked_.empty(); asked_.pop_front()) {
            const Read& read = asked_.front();
            uint64_t offset = read.offset_bytes;
            for (const iovec& piece : read.pieces) {
                std::memcpy(piece.iov_base, file_.data() + offset, piece.iov_len);
                const uint64_t end = offset + piece.iov_len;
                for (; offset < end; offset += CELL_BYTES) {
                    const auto cell = static_cast<uint32_t>(offset / CELL_BYTES);
                    if (in_pool(cell)) cells_read.push_back(cell);
                }
            }
            done_.push_back({read.tag, 0, {}});
            left_bytes -= std::min<uint64_t>(left_bytes, read.length_bytes());
        }
    }
    std::string level() const override { return "told"; }
    int register_file(const DirectFile&) override { return -1; }
    void unregister_file(int) override {}
    int register_memory(std::span<std::byte>) override { return -1; }
    void pin_memory(int) override {}
    void unregister_memory(int) override {}
    void submit(std::vector<Read> reads) override { std::move(reads.begin(), reads.end(), std::back_inserter(asked_)); }
    void reap(std::vector<Completion>& completions) override {
        completions.insert(completions.end(), done_.begin(), done_.end());
        done_.clear();
    }
    void wait() override {}
    ReadQueue queue() const override { return {}; }
    int event_fd() const override { return -1; }
    std::vector<uint32_t> cells_read;  // the last time, without gaps
    const Pool* pool = nullptr;        // of the only model

  private:
    bool in_pool(uint32_t cell) const {  // else it was read as a gap between cells
        const Place place = pool->find(cell);
        return place && place.slot().reading;
    }

    const std::vector<std::byte>& file_;
    std::deque<Read> asked_;
    std::vector<Completion> done_;
};

class Counter final : public Session {
  public:
    using Session::Session;
    void granted(uint32_t tag, uint32_t, Place, const Pool&) override { grants[tag]++; }
    void failed(uint32_t, uint32_t, ring::Status, uint32_t) override { FAIL(); }
    void flush() override {}
    std::map<uint32_t, uint32_t> grants;  // by tag
};

struct ScansTest : testing::Test {
    FlashModel flash{1, CELLS* CELL_BYTES / 1024, "model", CELL_BYTES};
    ToldReader reader{flash.bytes};
    Verifier verifier{1};
    Engine engine{minimum_dram_bytes(flash.spec) + CELLS / 2 * uint64_t{CELL_BYTES}, reader, verifier};
    Clock::time_point now = Clock::now();

    ScansTest() { engine.models().add(flash.spec, false); }

    Counter& open() {
        EXPECT_TRUE(engine.models().activate(0));
        reader.pool = engine.model(0).pool.get();
        return static_cast<Counter&>(engine.open(std::make_unique<Counter>(0, CELLS, AHEAD * CHUNK)));
    }
    void acquire(Session& session, uint32_t begin, uint32_t count, uint32_t tag = 0) {
        std::vector<uint32_t> cells(count);
        std::iota(cells.begin(), cells.end(), begin);
        ASSERT_TRUE(engine.acquire(session, 0, cells, tag));
    }
    void release(Session& session, uint32_t begin, uint32_t count) {
        std::vector<uint32_t> cells(count);
        std::iota(cells.begin(), cells.end(), begin);
        ASSERT_TRUE(engine.release(session, 0, cells));
    }
    size_t deferred() { return engine.scans(0).deferred(); }
    uint64_t cells_reading() {  // after step() has submitted what is missing
        const Pool& pool = *engine.model(0).pool;
        uint64_t count = 0;
        for (uint32_t cell = 0; cell < CELLS; cell++) {
            const Place place = pool.find(cell);
            count += place && place.slot().reading && !place.slot().deferred ? 1 : 0;
        }
        return count;
    }
    void step(std::chrono::microseconds passed = {}) {
        now += passed;
        engine.set_time(now);
        engine.step();
    }
    void read(uint32_t cells) {  // cells, and verifies them
        reader.read(cells);
        const Pool& pool = *engine.model(0).pool;
        const auto is_unverified = [&](uint32_t cell) {
            const Place place = pool.find(cell);
            return place && place.slot().reading;
        };
        do step();
        while (std::any_of(reader.cells_read.begin(), reader.cells_read.end(), is_unverified));
    }
    void read_chunk() {
        step(CHUNK_TIME);
        read(CHUNK);
    }
};

// One scan, which asks for some chunks ahead.
class Scanning {
  public:
    Scanning(ScansTest& test, uint32_t begin) : test_(test), session_(test.open()), begin_(begin) {}
    void move(uint32_t chunks = AHEAD) {
        const uint32_t end = used_ + chunks;
        for (; used_ < end && session_.grants[used_] == CHUNK; used_++) test_.release(session_, cell(used_), CHUNK);
        for (; asked_ < used_ + AHEAD; asked_++) test_.acquire(session_, cell(asked_), CHUNK, asked_);
    }
    uint32_t cells() const { return used_ * CHUNK; }

  private:
    uint32_t cell(uint32_t chunk) const { return (begin_ + chunk * CHUNK) % CELLS; }

    ScansTest& test_;
    Counter& session_;
    uint32_t begin_;
    uint32_t asked_ = 0;  // chunks
    uint32_t used_ = 0;
};

// Two scans, one far ahead of the other: what it asks for is deferred.
struct TwoScansTest : ScansTest {
    static constexpr uint32_t PLACE = CELLS / 4;  // of the scan ahead
    Counter& behind = open();
    Counter& ahead = open();

    TwoScansTest() {
        acquire(behind, 0, CHUNK);
        acquire(ahead, PLACE, CHUNK);
        step();
        EXPECT_EQ(cells_reading(), CHUNK);
        EXPECT_EQ(deferred(), CHUNK);
        EXPECT_TRUE(engine.defers_reads());
    }
    void close(Session& session) {
        engine.close(session.id);
        step();
    }
};

TEST_F(TwoScansTest, TheScanAheadWaitsForASecond) {
    for (int i = 0; i < 9; i++) {
        acquire(behind, (i + 1) * CHUNK, 16);
        step(std::chrono::milliseconds{100});
        EXPECT_EQ(deferred(), CHUNK);
    }
    step(std::chrono::milliseconds{110});
    EXPECT_EQ(deferred(), 0U);
    read(10 * CHUNK);
    EXPECT_EQ(ahead.grants[0], CHUNK);
}

TEST_F(TwoScansTest, NoScanWaitsForOneThatAsksForNothing) {
    read(CHUNK);
    step(std::chrono::milliseconds{490});
    EXPECT_EQ(deferred(), CHUNK);
    step(std::chrono::milliseconds{20});
    EXPECT_EQ(deferred(), 0U);
}

TEST_F(TwoScansTest, TheScanAheadWaitsUntilTheOtherGetsThere) {
    acquire(behind, PLACE, CHUNK);
    step();
    EXPECT_EQ(deferred(), 0U);
}

TEST_F(TwoScansTest, ASessionThatDoesNotScanIsNotDeferred) {
    Counter& other = open();
    ASSERT_TRUE(engine.acquire(other, 0, std::array{PLACE + 3}, 0));
    step();
    EXPECT_EQ(deferred(), CHUNK - 1);
    read(CHUNK + 1);
    EXPECT_EQ(other.grants[0], 1U);
}

TEST_F(TwoScansTest, DeferredCellsAreReadWhenTheirScanEnds) {
    close(ahead);
    EXPECT_EQ(deferred(), 0U);
    read(2 * CHUNK);
    EXPECT_EQ(engine.model(0).pool->busy(), CHUNK) << "only leased slots are busy";
}

TEST_F(TwoScansTest, DeferredCellsAreReadWhenTheLaggardEnds) {
    close(behind);
    EXPECT_EQ(deferred(), 0U);
    read(2 * CHUNK);
    EXPECT_EQ(ahead.grants[0], CHUNK);
}

// Cells read per turn, while the first scan goes through all cells so many times.
double cells_per_turn(ScansTest& test, std::vector<Scanning> scans, uint32_t turns) {
    const uint64_t before = test.engine.model(0).counts.read_bytes;
    while (scans.front().cells() < turns * CELLS) {
        for (Scanning& scan : scans) scan.move();
        test.read_chunk();
    }
    return static_cast<double>(test.engine.model(0).counts.read_bytes - before) / CELL_BYTES / turns;
}

TEST_F(ScansTest, ScansThatStartApartComeTogether) {
    const double alone = cells_per_turn(*this, {Scanning(*this, 0)}, 8);  // then this scan keeps its leases and rests
    EXPECT_LT(alone, 0.7 * CELLS);
    std::vector<Scanning> three{Scanning(*this, 0), Scanning(*this, CELLS / 4), Scanning(*this, CELLS / 2)};
    EXPECT_LT(cells_per_turn(*this, three, 8), 1.25 * alone);
}

TEST_F(ScansTest, AScanThatStaysSlowHoldsUpTheOthersOnlyBriefly) {
    std::vector<Scanning> fast{Scanning(*this, 0), Scanning(*this, 0), Scanning(*this, CELLS / 8)};
    Scanning slow(*this, CELLS / 2);
    std::chrono::microseconds waited{0};
    const Clock::time_point began = now;
    while (now - began < std::chrono::seconds{3}) {
        for (Scanning& scan : fast) scan.move();
        slow.move(fast.front().cells() / 50 > slow.cells() ? 1 : 0);
        read_chunk();
        if (deferred() > 0) waited += CHUNK_TIME;
    }
    EXPECT_GT(waited, std::chrono::milliseconds{1000});
    EXPECT_LT(waited, std::chrono::milliseconds{1000 + 3000 / 8});
}

}  // namespace
}  // namespace weightd
