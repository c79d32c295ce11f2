#include "device/reader.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <map>
#include <random>

#include "device/read_turns.h"
#include "device/shared_memory.h"
#include "flash_file.h"

namespace weightd {
namespace {

struct ReaderTest : testing::TestWithParam<std::string> {
    TestFolder folder;
    std::string note;

    std::unique_ptr<Reader> make(uint32_t depth = 16) { return make_reader(GetParam(), 8, depth, note); }

    static std::map<uint64_t, int> finish(Reader& reader, size_t count) {
        std::vector<Completion> completions;
        while (completions.size() < count) {
            reader.wait();
            reader.reap(completions);
        }
        std::map<uint64_t, int> errors;
        for (const Completion& completion : completions) errors[completion.tag] = completion.error;
        return errors;
    }
};

Read read_of(uint64_t tag, const DirectFile& file, uint64_t offset, std::vector<iovec> pieces) {
    Read read;
    read.tag = tag;
    read.file = &file;
    read.offset_bytes = offset;
    read.pieces = std::move(pieces);
    return read;
}

TEST_P(ReaderTest, KnowsItsQueueAndHowLongReadsTook) {
    const auto bytes = random_bytes(4096 * 300, 1);
    write_file(folder.file("f"), bytes);
    const DirectFile file(folder.file("f"), false);
    SharedMemory memory("test", bytes.size());
    const auto reader = make(16);
    const uint32_t depth = weightd::reads_in_all(GetParam() == "threads" ? 8 : 16);
    EXPECT_EQ(reader->queue().depth_limit, depth);
    EXPECT_EQ(reader->queue().in_flight_max, 0U);
    std::vector<Read> reads;
    for (uint64_t i = 0; i < 300; i++) {
        reads.push_back(read_of(i, file, i * 4096, {{memory.data() + i * 4096, 4096}}));
    }
    reader->submit(std::move(reads));
    std::vector<Completion> completions;
    while (completions.size() < 300) {
        const ReadQueue queue = reader->queue();
        EXPECT_LE(queue.in_flight, depth);
        const size_t late = GetParam() == "threads" ? depth : 0;  // a thread answers before it is counted out
        EXPECT_LE(queue.in_flight + queue.waiting, 300 - completions.size() + late);
        reader->wait();
        reader->reap(completions);
    }
    for (const Completion& completion : completions) EXPECT_GT(completion.took.count(), 0);
    EXPECT_EQ(reader->queue().waiting, 0U);
    EXPECT_GE(reader->queue().in_flight_max, 1U);
    EXPECT_LE(reader->queue().in_flight_max, depth);
}

TEST_P(ReaderTest, ReadsMoreThanItsDepthIntoTheirPlaces) {
    const auto bytes = random_bytes(4096 * 300, 1);
    write_file(folder.file("f"), bytes);
    const DirectFile file(folder.file("f"), false);
    SharedMemory memory("test", bytes.size());
    const auto reader = make();
    const int buffer = reader->register_memory(memory.bytes());
    const int index = reader->register_file(file);
    for (int time = 0; time < 2; time++) {  // into memory that is not pinned, then into pinned memory
        std::vector<Read> reads;
        for (uint64_t i = 0; i < 300; i++) {
            reads.push_back(read_of(i, file, i * 4096, {{memory.data() + i * 4096, 4096}}));
            reads.back().buffer_index = buffer;
            reads.back().file_index = index;
        }
        reader->submit(std::move(reads));
        const auto errors = finish(*reader, 300);
        EXPECT_EQ(errors.size(), 300U);
        for (const auto& [tag, error] : errors) EXPECT_EQ(error, 0) << tag;
        EXPECT_EQ(std::memcmp(memory.data(), bytes.data(), bytes.size()), 0);
        std::memset(memory.data(), 0, bytes.size());
        reader->pin_memory(buffer);
    }
    reader->unregister_memory(buffer);
    reader->unregister_file(index);
}

// With more workers than one file may have at once, and few: one that is not woken would leave a read behind.
TEST_P(ReaderTest, ServesSeveralFilesToTheLastRead) {
    const auto bytes = random_bytes(4096 * 16, 1);
    write_file(folder.file("f"), bytes);
    std::vector<DirectFile> files;
    for (int i = 0; i < 3; i++) files.emplace_back(folder.file("f"), false);
    SharedMemory memory("test", 4096 * 16);
    const auto reader = make_reader(GetParam(), 2, 2, note);
    std::mt19937 random(5);
    for (int round = 0; round < 300; round++) {
        size_t asked = 0;
        for (uint32_t parts = 1 + random() % 3; parts > 0; parts--) {
            std::vector<Read> reads;
            for (uint32_t count = 1 + random() % 5; count > 0; count--, asked++) {
                const DirectFile& file = files[random() % files.size()];
                const uint64_t offset = asked * 4096;
                reads.push_back(read_of(asked, file, offset, {{memory.data() + offset, 4096}}));
            }
            reader->submit(std::move(reads));
        }
        for (const auto& [tag, error] : finish(*reader, asked)) ASSERT_EQ(error, 0) << tag;
    }
}

TEST_P(ReaderTest, ScattersOneReadOverSeveralPieces) {
    const auto bytes = random_bytes(4096 * 4, 2);
    write_file(folder.file("f"), bytes);
    const DirectFile file(folder.file("f"), false);
    SharedMemory memory("test", 4096 * 8);
    const auto reader = make();
    std::vector<Read> reads;
    reads.push_back(
        read_of(5, file, 0, {{memory.data() + 4096 * 6, 8192}, {memory.data(), 4096}, {memory.data() + 8192, 4096}}));
    reader->submit(std::move(reads));
    EXPECT_EQ(finish(*reader, 1).at(5), 0);
    EXPECT_EQ(std::memcmp(memory.data() + 4096 * 6, bytes.data(), 8192), 0);
    EXPECT_EQ(std::memcmp(memory.data(), bytes.data() + 8192, 4096), 0);
    EXPECT_EQ(std::memcmp(memory.data() + 8192, bytes.data() + 12288, 4096), 0);
}

TEST_P(ReaderTest, TakesWhatThereIsAtTheEndOfTheFile) {
    const auto bytes = random_bytes(4096 + 96, 3);
    write_file(folder.file("f"), bytes);
    const DirectFile file(folder.file("f"), false);
    SharedMemory memory("test", 8192);
    const auto reader = make();
    std::vector<Read> reads;
    reads.push_back(read_of(1, file, 0, {{memory.data(), 8192}}));
    reader->submit(std::move(reads));
    EXPECT_EQ(finish(*reader, 1).at(1), 0);
    EXPECT_EQ(std::memcmp(memory.data(), bytes.data(), bytes.size()), 0);
}

TEST_P(ReaderTest, ReportsAFileThatWasTruncated) {
    write_file(folder.file("f"), random_bytes(8192, 4));
    const DirectFile file(folder.file("f"), false);
    ASSERT_EQ(::truncate(folder.file("f").c_str(), 4096), 0);
    SharedMemory memory("test", 8192);
    const auto reader = make();
    std::vector<Read> reads;
    reads.push_back(read_of(1, file, 4096, {{memory.data(), 4096}}));
    reads.push_back(read_of(2, file, 0, {{memory.data(), 8192}}));
    reader->submit(std::move(reads));
    const auto errors = finish(*reader, 2);
    EXPECT_EQ(errors.at(1), EIO);
    EXPECT_EQ(errors.at(2), EIO);
}

TEST_P(ReaderTest, ReportsMemoryThatIsNotThere) {
    write_file(folder.file("f"), random_bytes(4096, 5));
    const DirectFile file(folder.file("f"), false);
    const auto reader = make();
    std::vector<Read> reads;
    reads.push_back(read_of(1, file, 0, {{reinterpret_cast<void*>(4096), 4096}}));
    reader->submit(std::move(reads));
    EXPECT_EQ(finish(*reader, 1).at(1), EFAULT);
}

INSTANTIATE_TEST_SUITE_P(Engines, ReaderTest, testing::Values("auto", "threads"));

TEST(Reader, RefusesAnUnknownEngine) {
    std::string note;
    EXPECT_THROW(make_reader("libaio", 1, 1, note), std::invalid_argument);
}

TEST(Reader, GoesOnWithoutRegisteredBuffersUnderASmallMemlockLimit) {
    std::string note;
    if (::geteuid() == 0) {  // root passes the limit; an ordinary user does not
        const pid_t child = ::fork();
        if (child == 0) {
            const rlimit limit{8U << 20, 8U << 20};
            std::string why;
            const bool ready = ::setrlimit(RLIMIT_MEMLOCK, &limit) == 0 && ::setuid(65534) == 0;
            const auto reader = make_reader("auto", 4, 8, why);
            const bool falls_back = reader->level() != "io_uring with registered file and buffers" && !why.empty();
            ::_exit(ready && falls_back ? 0 : 1);
        }
        int status = 0;
        ASSERT_EQ(::waitpid(child, &status, 0), child);
        EXPECT_EQ(status, 0);
    } else {
        EXPECT_FALSE(make_reader("auto", 4, 8, note)->level().empty());
    }
}

TEST(DirectFile, RefusesWhatIsMissing) { EXPECT_THROW(DirectFile("/no/such/file", false), std::system_error); }

TEST(ReadTurnsTest, FilesTakeTurnsAndNoneTakesEveryPlace) {
    TestFolder folder;
    write_file(folder.file("f"), random_bytes(4096, 1));
    const DirectFile slow(folder.file("f"), false);
    const DirectFile quick(folder.file("f"), false);
    ReadTurns queue(2);
    for (uint64_t i = 0; i < 4; i++) queue.push(read_of(i, slow, 0, {}));
    EXPECT_EQ(queue.startable(), 2U);
    EXPECT_EQ(queue.next()->tag, 0U);
    EXPECT_EQ(queue.startable(), 1U);
    EXPECT_EQ(queue.next()->tag, 1U);
    EXPECT_EQ(queue.startable(), 0U);
    EXPECT_FALSE(queue.next()) << "a third of the same file";
    queue.push(read_of(10, quick, 0, {}));
    EXPECT_EQ(queue.startable(), 1U);
    EXPECT_EQ(queue.next()->tag, 10U);
    queue.ended(&slow);
    EXPECT_EQ(queue.startable(), 1U);
    queue.push_first(read_of(1, slow, 0, {}));
    EXPECT_EQ(queue.next()->tag, 1U) << "what has begun goes on first";
    queue.ended(&quick);
    EXPECT_FALSE(queue.next());
    static_assert(reads_in_all(8) == 9 && reads_in_all(1) == 2);
}

TEST(ReadTest, GoesOnBehindTheLastWholeBlock) {
    TestFolder folder;
    write_file(folder.file("f"), random_bytes(10'000, 1));
    const DirectFile file(folder.file("f"), false);
    std::vector<std::byte> memory(12'288);
    Read read = read_of(0, file, 0, {{memory.data(), memory.size()}});
    EXPECT_EQ(read.advance(100), Read::Left::stuck);
    EXPECT_EQ(read.advance(5000), Read::Left::more);
    EXPECT_EQ(read.offset_bytes, 4096U);
    EXPECT_EQ(read.pieces[0].iov_base, memory.data() + 4096);
    EXPECT_EQ(read.advance(10'000 - 4096), Read::Left::nothing);
}

}  // namespace
}  // namespace weightd
