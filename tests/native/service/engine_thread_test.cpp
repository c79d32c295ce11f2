// The daemon's engine when the system or its clients leave it nothing: it refuses, waits and goes on.
#include "service/engine_thread.h"

#include <gtest/gtest.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <future>
#include <thread>

#include "flash_file.h"
#include "memory/model_cost.h"

namespace weightd {
namespace {

constexpr uid_t ANOTHER_USER = 4242;

struct EngineThreadTest : testing::Test {
    TestFolder folder;

    std::unique_ptr<EngineThread> serve(const FlashModel& model, uint64_t dram_bytes = 512U << 20) {
        auto engine =
            std::make_unique<EngineThread>(EngineOptions{dram_bytes, {"threads", 2, 32, false}, folder.file("data")});
        EXPECT_EQ(engine->add_model(model.spec), 0U);
        return engine;
    }

    static void expect_cell(EngineThread& engine, const FlashModel& model, uint32_t cell) {
        std::vector<std::byte> out(4096);
        engine.fetch(0, 0, std::array{cell}, out);
        EXPECT_EQ(std::memcmp(out.data(), model.cell(0, cell), 4096), 0);
    }

    // Attaches to a session and checks that it was welcome: its connection, and in `got` what came with it.
    Descriptor attach(const Token& token, std::vector<Descriptor>* got = nullptr) const {
        Descriptor socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
        connect(socket);
        ring::Hello hello{ring::MAGIC, ring::VERSION, {}};
        std::copy(token.begin(), token.end(), hello.token);
        EXPECT_EQ(::send(socket.get(), &hello, sizeof hello, 0), static_cast<ssize_t>(sizeof hello));
        ring::Welcome welcome{};
        iovec part{&welcome, sizeof welcome};
        alignas(cmsghdr) std::array<char, CMSG_SPACE(3 * sizeof(int))> control{};
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control.data();
        message.msg_controllen = control.size();
        EXPECT_EQ(::recvmsg(socket.get(), &message, MSG_CMSG_CLOEXEC), static_cast<ssize_t>(sizeof welcome));
        EXPECT_EQ(welcome.error, 0U);
        const cmsghdr* header = CMSG_FIRSTHDR(&message);
        for (size_t i = 0; header != nullptr && i < 3; i++) {
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
            Descriptor received(fd);
            if (got != nullptr) got->push_back(std::move(received));
        }
        return socket;
    }

    void connect(const Descriptor& socket) const {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        const std::string path = folder.file("data");
        std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
        EXPECT_EQ(::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    }
};

// While it lives this process can open no descriptor.
struct NoDescriptors {
    rlimit before{};
    NoDescriptors() {
        ::getrlimit(RLIMIT_NOFILE, &before);
        const Descriptor lowest(::dup(0));  // all below it are in use
        const rlimit none{static_cast<rlim_t>(lowest.get()), before.rlim_max};
        ::setrlimit(RLIMIT_NOFILE, &none);
    }
    ~NoDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before); }
};

TEST_F(EngineThreadTest, OneUserLeavesSessionsToOthers) {
    FlashModel model(1, 40);
    const auto engine = serve(model);
    std::vector<Descriptor> attached;
    try {
        while (true) attached.push_back(attach(engine->open_session(0, 2).token));
    } catch (const NoRoom& error) {
        EXPECT_NE(std::string(error.what()).find("224 of 256 are open"), std::string::npos) << error.what();
        EXPECT_NE(std::string(error.what()).find("kept for other users"), std::string::npos) << error.what();
    }
    EXPECT_EQ(attached.size(), SESSIONS_MAX / 8 * 7);
    EXPECT_EQ(engine->open_session(0, 2, ANOTHER_USER).share_slots, 2U);
    expect_cell(*engine, model, 3);
}

TEST_F(EngineThreadTest, WhoNeverAttachesLosesHisOldestSessions) {
    FlashModel model(1, 40);
    const auto engine = serve(model);
    const Token modest = engine->open_session(0, 2).token;
    for (uint32_t i = 0; i < 2 * SESSIONS_MAX; i++) engine->open_session(0, 2, ANOTHER_USER);
    EXPECT_LE(engine->report().sessions, 64U);
    attach(modest);
}

TEST_F(EngineThreadTest, WhoNeverAttachesKeepsNoMemoryFromOthers) {
    FlashModel model(1, 4000);
    const auto engine = serve(model, minimum_dram_bytes(model.spec) + (4U << 20));
    try {
        while (true) engine->open_session(0, 0, ANOTHER_USER);
    } catch (const NoRoom& error) {
        EXPECT_NE(std::string(error.what()).find("kept for other users"), std::string::npos) << error.what();
    }
    std::vector<Descriptor> attached;
    for (uint32_t i = 0; i < 3; i++) attached.push_back(attach(engine->open_session(0, 100).token));
}

TEST_F(EngineThreadTest, ClosedRingsThatAreKeptCountAsSessionsOfTheirUser) {
    FlashModel model(1, 40);
    const auto engine = serve(model);
    std::vector<Descriptor> kept;
    const auto open_and_keep = [&] {
        std::vector<Descriptor> got;
        attach(engine->open_session(0, 2).token, &got);
        kept.push_back(std::move(got.at(0)));
    };
    EXPECT_THROW(while (true) open_and_keep(), NoRoom);
    EXPECT_LE(kept.size(), SESSIONS_MAX / 8 * 7);
    while (engine->report().sessions > 0) std::this_thread::yield();  // all of them are closed
    EXPECT_THROW(engine->open_session(0, 2), NoRoom);
    uint64_t bytes = 0;
    for (const Descriptor& ring : kept) {
        struct stat facts {};
        ASSERT_EQ(::fstat(ring.get(), &facts), 0);
        bytes += static_cast<uint64_t>(facts.st_blocks) * 512;
    }
    EXPECT_LE(bytes, kept.size() * sizeof(ring::Header));
    EXPECT_EQ(engine->open_session(0, 2, ANOTHER_USER).share_slots, 2U);
    kept.clear();
    EXPECT_EQ(engine->open_session(0, 2).share_slots, 2U);
}

TEST_F(EngineThreadTest, SilentConnectionsShutNobodyOut) {
    FlashModel model(1, 40);
    const auto engine = serve(model);
    std::vector<Descriptor> silent;
    for (uint32_t i = 0; i < 200; i++) {
        silent.emplace_back(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
        connect(silent.back());
        if (i % 20 == 0) attach(engine->open_session(0, 2).token);
    }
    pollfd oldest{silent.front().get(), POLLIN, 0};
    EXPECT_EQ(::poll(&oldest, 1, 10'000), 1);
    char byte = 0;
    EXPECT_EQ(::recv(oldest.fd, &byte, 1, MSG_DONTWAIT), 0) << "the daemon has closed it";
}

// Threads of a client that wait for one bell, each parked before the constructor is done.
struct Parked {
    std::atomic<uint32_t>& bell;
    std::atomic<uint32_t> woken = 0;
    std::vector<std::thread> threads;

    Parked(std::atomic<uint32_t>& rung, uint32_t count) : bell(rung) {
        std::atomic<uint32_t> ready = 0;
        std::vector<std::atomic<pid_t>> ids(count);
        const uint32_t seen = bell.load();
        for (uint32_t i = 0; i < count; i++) {
            threads.emplace_back([&, i, seen] {
                ids[i] = static_cast<pid_t>(::syscall(SYS_gettid));
                ready++;
                if (::syscall(SYS_futex, &bell, FUTEX_WAIT, seen, nullptr, nullptr, 0) == 0) woken++;
            });
        }
        while (ready < count) std::this_thread::yield();
        for (const auto& id : ids) {
            while (state_of(id) != 'S') std::this_thread::yield();
        }
    }
    ~Parked() {
        wake_all();
        for (std::thread& each : threads) each.join();
    }
    long wake_all() { return ::syscall(SYS_futex, &bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

    static char state_of(pid_t thread) {
        std::ifstream file("/proc/self/task/" + std::to_string(thread) + "/stat");
        std::string word;
        while (file >> word && word.back() != ')') continue;  // its name
        char state = 0;
        file >> state;
        return state;
    }
};

TEST_F(EngineThreadTest, AnAnswerWakesOneOfManyThatWait) {
    constexpr uint32_t WAITING = 50;
    FlashModel model(1, 40);
    const auto engine = serve(model);
    std::vector<Descriptor> got;
    const Descriptor socket = attach(engine->open_session(0, 2).token, &got);
    void* mapped = ::mmap(nullptr, sizeof(ring::Ring), PROT_READ | PROT_WRITE, MAP_SHARED, got.at(0).get(), 0);
    ASSERT_NE(mapped, MAP_FAILED);
    auto& ring = *static_cast<ring::Ring*>(mapped);
    {
        Parked parked(ring.header.bell, WAITING);
        ring.header.client_sleeps = 1;
        ring.words[0][0] = 3;
        ring.requests[0] = {ring::ACQUIRE, ring::CELLS, 0, 1, 0, 0, {}};
        ring.header.request_tail = 1;
        const uint64_t one = 1;
        ASSERT_EQ(::write(got.at(1).get(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
        while (ring.header.grant_tail == 0 || parked.woken == 0) std::this_thread::yield();
        engine->report();                           // waits for the turn of the loop that answered
        EXPECT_GE(parked.wake_all(), WAITING - 4);  // the bell may have rung before the request, too
    }
    ::munmap(mapped, sizeof(ring::Ring));
}

TEST_F(EngineThreadTest, AModelThatComesWhileThePoolIsFullHasRoom) {
    FlashModel model(1, 4000);
    FlashModel other(1, 4000, "other");
    const auto engine = serve(model, minimum_dram_bytes(model.spec) + (2U << 20));
    for (uint32_t cell = 0; cell < 900; cell++) expect_cell(*engine, model, cell);
    const Report full = engine->report();
    EXPECT_LT(full.dram_limit_bytes - full.dram_pool_bytes - full.dram_resident_bytes - full.dram_tables_bytes, 8192U);
    EXPECT_EQ(engine->add_model(other.spec), 1U);
    std::vector<std::byte> out(4096);
    engine->fetch(1, 0, std::array{7U}, out);
    EXPECT_EQ(std::memcmp(out.data(), other.cell(0, 7), 4096), 0);
    expect_cell(*engine, model, 3);
}

TEST_F(EngineThreadTest, RefusesASessionForWhichThereIsNoDescriptor) {
    FlashModel model(1, 40);
    const auto engine = serve(model);
    expect_cell(*engine, model, 3);  // the resident weights are in memory
    {
        const NoDescriptors none;
        EXPECT_THROW(engine->open_session(0, 2), NoRoom);
    }
    EXPECT_EQ(engine->open_session(0, 2).share_slots, 2U);
    EXPECT_EQ(engine->report().sessions, 1U);
}

TEST_F(EngineThreadTest, AReadWaitsForTheDescriptorOfItsSegment) {
    FlashModel model(1, 40);
    const auto engine = serve(model);
    std::vector<std::byte> byte(1);
    engine->fetch_resident(0, 0, byte);  // active, but without a segment
    std::promise<void> begin;
    auto read = std::async(std::launch::async, [&] {
        begin.get_future().wait();
        expect_cell(*engine, model, 3);
    });
    auto none = std::make_unique<NoDescriptors>();
    begin.set_value();
    EXPECT_EQ(read.wait_for(std::chrono::milliseconds(300)), std::future_status::timeout);
    EXPECT_EQ(engine->report().models[0].slots, 0U);
    none.reset();
    read.get();
}

TEST_F(EngineThreadTest, AConnectionWaitsForADescriptorAndNothingSpins) {
    FlashModel model(1, 40);
    const auto engine = serve(model);
    const Descriptor socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    const ring::Hello hello{ring::MAGIC, ring::VERSION, {}};  // a token that nobody has
    pollfd answered{socket.get(), POLLIN, 0};
    {
        const NoDescriptors none;
        connect(socket);
        EXPECT_EQ(::send(socket.get(), &hello, sizeof hello, 0), static_cast<ssize_t>(sizeof hello));
        const std::clock_t before = std::clock();
        EXPECT_EQ(::poll(&answered, 1, 500), 0);
        EXPECT_LT(std::clock() - before, CLOCKS_PER_SEC / 4);
    }
    EXPECT_EQ(::poll(&answered, 1, 10'000), 1);
    ring::Welcome welcome{};
    EXPECT_EQ(::recv(socket.get(), &welcome, sizeof welcome, 0), static_cast<ssize_t>(sizeof welcome));
    EXPECT_EQ(welcome.error, static_cast<uint32_t>(ENOENT));
}

TEST_F(EngineThreadTest, LoadingOneModelKeepsNoOtherWaiting) {
    FlashModel model(1, 40);
    FlashModel slow(1, 40, "slow");
    slow.spec.resident_path = folder.file("pipe");  // opening it waits for a writer
    ASSERT_EQ(::mkfifo(slow.spec.resident_path.c_str(), 0600), 0);
    const auto engine = serve(model);
    ASSERT_EQ(engine->add_model(slow.spec), 1U);
    auto loading = std::async(std::launch::async, [&] { engine->open_session(1, 2); });
    while (engine->report().dram_resident_bytes == 0) std::this_thread::yield();  // it is active, and reads
    auto other = std::async(std::launch::async, [&] { return engine->open_session(0, 2).share_slots; });
    EXPECT_EQ(other.wait_for(std::chrono::seconds(20)), std::future_status::ready);
    const Descriptor writer(::open(slow.spec.resident_path.c_str(), O_WRONLY | O_CLOEXEC));
    EXPECT_THROW(loading.get(), std::exception);  // a pipe is no file of that size
    EXPECT_EQ(other.get(), 2U);
}

TEST_F(EngineThreadTest, WhoWaitsForAnOpeningWhoseDeviceIsSilentIsTold) {
    FlashModel slow(1, 40, "slow");
    slow.spec.resident_path = folder.file("pipe");
    ASSERT_EQ(::mkfifo(slow.spec.resident_path.c_str(), 0600), 0);
    EngineThread engine({64U << 20, {"threads", 2, 32, false, std::chrono::milliseconds(300)}, folder.file("data")});
    ASSERT_EQ(engine.add_model(slow.spec), 0U);
    auto first = std::async(std::launch::async, [&] { engine.open_session(0, 2); });
    while (engine.report().dram_resident_bytes == 0) std::this_thread::yield();
    const uint32_t cell = 0;
    std::vector<std::byte> out(slow.spec.cell_bytes);
    EXPECT_THROW(engine.open_session(0, 2), Unanswered);
    EXPECT_THROW(engine.fetch(0, 0, {&cell, 1}, out), Unanswered);
    EXPECT_EQ(first.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
    const Descriptor writer(::open(slow.spec.resident_path.c_str(), O_WRONLY | O_CLOEXEC));
    EXPECT_THROW(first.get(), std::exception);
    EXPECT_EQ(engine.report().sessions, 0U);
}

TEST_F(EngineThreadTest, AFaultOfItsLoopStopsItAndIsTold) {
    FlashModel model(1, 40);
    const auto engine = serve(model);
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
        std::error_code gone;
        if (std::filesystem::read_symlink(entry, gone).string() != "anon_inode:[eventpoll]") continue;
        const int fd = std::stoi(entry.path().filename().string());
        EXPECT_EQ(::syscall(SYS_dup3, 0, fd, O_CLOEXEC), fd);  // behind the sanitizer's back: it would see a race
    }
    const auto ask_for_ever = [&] {  // the first wakes the loop, which finds that it can wait no more
        while (true) engine->report();
    };
    EXPECT_THROW(ask_for_ever(), Stopping);
    pollfd failed{engine->failed_fd(), POLLIN, 0};
    EXPECT_EQ(::poll(&failed, 1, 10'000), 1);
    EXPECT_NE(engine->failure().find("epoll_wait"), std::string::npos) << engine->failure();
}

}  // namespace
}  // namespace weightd
