// Both ends of the ring: the daemon's engine and the client's session in one process, over real sockets.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <atomic>
#include <numeric>
#include <thread>

#include "ring_fixture.h"

namespace {

struct RingTest : RingFixture {};

TEST_F(RingTest, FindsTheResidentWeights) {
    FlashModel model(1, 8);
    const auto engine = serve(model, 10);
    const auto session = attach(*engine);
    ASSERT_EQ(session->resident().size(), model.resident.size());
    EXPECT_EQ(std::memcmp(session->resident().data(), model.resident.data(), model.resident.size()), 0);
    session->resident()[0] = std::byte{1};  // a private copy
    const auto other = attach(*engine);
    EXPECT_EQ(other->resident()[0], model.resident[0]);
}

TEST_F(RingTest, RefusesCorruptResidentWeights) {
    FlashModel model(1, 8);
    weightd::flip_byte(model.spec.resident_path, 70'000);
    const auto engine = serve(model, 10);
    try {
        engine->open_session(0, 4);
        FAIL() << "a corrupt tensor was served";
    } catch (const weightd::CorruptResident& error) {
        EXPECT_NE(std::string(error.what()).find("tensor b"), std::string::npos);
    }
}

TEST_F(RingTest, GivesTheSameBytesInBand) {
    FlashModel model(2, 301);
    const auto engine = serve(model, 30);
    const std::vector<uint32_t> cells{5, 0, 75, 5, 33};
    std::vector<std::byte> out(cells.size() * 4096);
    engine->fetch(0, 1, cells, out);
    for (size_t i = 0; i < cells.size(); i++) {
        EXPECT_EQ(std::memcmp(out.data() + i * 4096, model.cell(1, cells[i]), 4096), 0);
    }
    EXPECT_THROW(engine->fetch(0, 1, std::array{76U}, std::span(out).first(4096)), std::out_of_range);
    weightd::flip_byte(model.spec.bundles_path, model.offset(0, 9));
    EXPECT_THROW(engine->fetch(0, 0, std::array{2U}, std::span(out).first(4096)), weightd::CorruptBundle);
}

TEST_F(RingTest, TellsTheClientWhichBundleIsCorrupt) {
    FlashModel model(2, 300);
    weightd::flip_byte(model.spec.bundles_path, model.offset(1, 42));
    const auto engine = serve(model, 300);
    const auto session = attach(*engine, 64);
    Sweep sweep(*session, layout(model));
    try {
        for (const uint32_t layer : {0U, 1U}) {
            while (sweep.next(layer) != nullptr) continue;
        }
        FAIL() << "a corrupt bundle was granted";
    } catch (const flashclient::CorruptBundle& error) {
        EXPECT_NE(std::string(error.what()).find("layer 1, neuron at position 42"), std::string::npos) << error.what();
    }
    while (sweep.next(0) != nullptr) continue;  // the session goes on
}

TEST_F(RingTest, RefusesAWrongToken) {
    FlashModel model(1, 8);
    const auto engine = serve(model, 10);
    EXPECT_THROW(ClientSession(socket_path(), weightd::Token{}, 5.0), flashclient::SessionLost);
    const auto token = engine->open_session(0, 2).token;
    ClientSession first(socket_path(), token, 5.0);
    EXPECT_THROW(ClientSession(socket_path(), token, 5.0), flashclient::SessionLost) << "a token serves once";
}

TEST_F(RingTest, FreesTheLeasesOfAKilledClient) {
    FlashModel model(1, 301);
    const auto engine = serve(model, 30);
    const auto token = engine->open_session(0, 8).token;
    const pid_t child = ::fork();
    if (child == 0) {
        ClientSession session(socket_path(), token, 20.0);
        session.acquire(0, ring::CELLS, std::array{1U, 2U, 3U}, 0);
        grants(session, 3);
        ::kill(::getpid(), SIGKILL);
    }
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
    wait_until([&] { return engine->report().sessions == 0; });
    EXPECT_EQ(engine->report().models[0].slots_leased, 0U);
}

TEST_F(RingTest, RaisesInAForkedChild) {
    FlashModel model(1, 301);
    const auto engine = serve(model, 30);
    const auto session = attach(*engine);
    const pid_t child = ::fork();
    if (child == 0) {
        try {
            session->acquire(0, ring::CELLS, std::array{1U}, 0);
        } catch (const flashclient::WrongProcess&) {
            ::_exit(0);
        }
        ::_exit(1);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    session->acquire(0, ring::CELLS, std::array{1U}, 0);
    EXPECT_EQ(grants(*session, 1).size(), 1U);
}

TEST_F(RingTest, WakesAClientThatWaitsWhenTheDaemonStops) {
    FlashModel model(1, 301);
    const auto engine = serve(model, 30);
    const auto session = attach(*engine);
    std::atomic<bool> lost = false;
    std::thread client([&] {
        std::vector<ring::Grant> none;
        try {
            session->take_grants(none, true);
        } catch (const flashclient::SessionLost&) {
            lost = true;
        }
    });
    engine->stop();
    client.join();
    EXPECT_TRUE(lost);
}

// A client that speaks the protocol by hand, and badly.
struct Stranger {
    int socket = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    int fds[3] = {-1, -1, -1};
    ring::Ring* ring = nullptr;

    Stranger(const std::string& path, const weightd::Token& token) {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
        EXPECT_EQ(::connect(socket, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
        ring::Hello hello{ring::MAGIC, ring::VERSION, {}};
        std::copy(token.begin(), token.end(), hello.token);
        EXPECT_EQ(::send(socket, &hello, sizeof hello, 0), static_cast<ssize_t>(sizeof hello));
        ring::Welcome welcome{};
        iovec part{&welcome, sizeof welcome};
        alignas(cmsghdr) char control[CMSG_SPACE(3 * sizeof(int))];
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        EXPECT_EQ(::recvmsg(socket, &message, 0), static_cast<ssize_t>(sizeof welcome));
        std::memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fds);
        void* mapped = ::mmap(nullptr, sizeof(ring::Ring), PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
        EXPECT_NE(mapped, MAP_FAILED);
        ring = static_cast<ring::Ring*>(mapped);
    }

    ~Stranger() {
        ::munmap(ring, sizeof(ring::Ring));
        for (const int fd : {socket, fds[0], fds[1], fds[2]}) ::close(fd);
    }

    void post(const ring::Request& request) {
        ring->requests[ring->header.request_tail.load() % ring::REQUESTS] = request;
        ring->header.request_tail.fetch_add(1);
        ring_doorbell();
    }

    void ring_doorbell() const {
        const uint64_t one = 1;
        EXPECT_EQ(::write(fds[1], &one, sizeof one), static_cast<ssize_t>(sizeof one));
    }

    bool closed() const { return ring->header.state.load() == ring::CLOSED_FOR_A_BROKEN_RULE; }
};

TEST_F(RingTest, ClosesASessionThatBreaksARuleAndOnlyThatOne) {
    FlashModel model(1, 301);
    const auto engine = serve(model, 200);
    const auto good = attach(*engine);
    const std::vector<ring::Request> bad{
        {99, ring::CELLS, 0, 1, 0, 0, {}},             // unknown operation
        {ring::ACQUIRE, 77, 0, 1, 0, 0, {}},           // unknown form
        {ring::ACQUIRE, ring::CELLS, 5, 1, 0, 0, {}},  // no such layer
        {ring::ACQUIRE, ring::CELLS, 0, ring::WORDS + 1, 0, 0, {}},
        {ring::ACQUIRE, ring::RANGES, 0, 1, 0, 0, {}},  // half a range
        {ring::ACQUIRE, ring::RANGES, 0, 2, 0, 0, {}},  // backwards
        {ring::RELEASE, ring::CELLS, 0, 1, 0, 0, {}},   // holds nothing
        {ring::ACQUIRE, ring::CELLS, 0, 2, 0, 0, {}},   // a cell beyond the layer
        {ring::ACQUIRE, ring::CELLS, 0, 1, 0, 2, {}},   // gives back more words than there are
        {ring::ACQUIRE, ring::CELLS, 0, 1, 0, 1, {}},   // gives back what it does not hold
        {ring::ACQUIRE, ring::RANGES, 0, 2, 0, 2, {}},  // gives back ranges
        {ring::PREFETCH, ring::CELLS, 0, 1, 0, 1, {}},  // gives back in another operation
    };
    for (const ring::Request& request : bad) {
        Stranger stranger(socket_path(), engine->open_session(0, 2).token);
        const uint32_t words[2] = {9, 3};
        std::memcpy(stranger.ring->words[0], words, sizeof words);
        if (request.form == ring::CELLS && request.word_count == 2) stranger.ring->words[0][1] = 1'000'000;
        stranger.post(request);
        wait_until([&] { return stranger.closed(); });
    }
    {
        Stranger stranger(socket_path(), engine->open_session(0, 2).token);
        stranger.ring->header.request_tail.store(1'000'000);
        stranger.ring_doorbell();
        wait_until([&] { return stranger.closed(); });
    }
    good->acquire(0, ring::CELLS, std::array{1U}, 0);
    EXPECT_EQ(grants(*good, 1).size(), 1U);
    wait_until([&] { return engine->report().sessions == 1; });
}

TEST_F(RingTest, GivesBackBeforeItAcquires) {
    FlashModel model(1, 301);
    const auto engine = serve(model, 30);
    Stranger stranger(socket_path(), engine->open_session(0, 2).token);
    const auto acquire = [&](std::vector<uint32_t> words, uint32_t release_count) {
        const uint32_t answers = static_cast<uint32_t>(words.size()) - release_count;
        const uint32_t seen = stranger.ring->header.grant_tail.load();
        std::copy(words.begin(), words.end(),
                  stranger.ring->words[stranger.ring->header.request_tail.load() % ring::REQUESTS]);
        stranger.post({ring::ACQUIRE, ring::CELLS, 0, static_cast<uint32_t>(words.size()), 7, release_count, {}});
        wait_until([&] { return stranger.ring->header.grant_tail.load() == seen + answers; });
        std::map<uint32_t, uint32_t> statuses;  // by cell
        for (uint32_t i = seen; i < seen + answers; i++) {
            const ring::Grant& grant = stranger.ring->grants[i % ring::GRANTS];
            statuses[grant.cell] = grant.segment >> ring::STATUS_SHIFT;
        }
        return statuses;
    };
    using Statuses = std::map<uint32_t, uint32_t>;
    EXPECT_EQ(acquire({1, 2}, 0), (Statuses{{1, ring::GRANTED}, {2, ring::GRANTED}}));
    EXPECT_EQ(acquire({3, 4, 2, 1}, 2), (Statuses{{3, ring::GRANTED}, {4, ring::GRANTED}}))
        << "a full share turns over";
    wait_until([&] { return engine->report().models[0].slots_leased == 2; });
    stranger.ring->words[stranger.ring->header.request_tail.load() % ring::REQUESTS][0] = 3;
    stranger.post({ring::ACQUIRE, ring::CELLS, 0, 1, 0, 1, {}});  // gives back alone, asks for nothing
    wait_until([&] { return engine->report().models[0].slots_leased == 1; });
    EXPECT_FALSE(stranger.closed());
}

TEST_F(RingTest, TheLimitInTheRingFollowsWhoIsThere) {
    FlashModel model(1, 801);
    const auto engine = serve(model, 100);
    const Stranger alone(socket_path(), engine->open_session(0, 4).token);
    const uint32_t limit = alone.ring->header.lease_limit.load();
    EXPECT_GT(limit, 90U) << "nearly the whole pool";
    {
        const Stranger other(socket_path(), engine->open_session(0, 40).token);
        EXPECT_LT(alone.ring->header.lease_limit.load(), limit - 40);
        EXPECT_LT(alone.ring->header.lease_limit.load() + other.ring->header.lease_limit.load(), 106U);
    }
    wait_until([&] { return alone.ring->header.lease_limit.load() == limit; });
}

// All that it may lease, by its first request.
void lease_all(Stranger& stranger) {
    const uint32_t limit = stranger.ring->header.lease_limit.load();
    stranger.ring->words[0][0] = 0;
    stranger.ring->words[0][1] = limit;
    stranger.post({ring::ACQUIRE, ring::RANGES, 0, 2, 0, 0, {}});
    RingTest::wait_until([&] { return stranger.ring->header.grant_tail.load() == limit; });
}

TEST_F(RingTest, ClosesABorrowerThatKeepsOthersWaiting) {
    FlashModel model(1, 801);
    const auto engine = serve(model, 100);
    Stranger paused(socket_path(), engine->open_session(0, 4).token);
    lease_all(paused);
    const auto other = attach(*engine, 40);
    std::vector<uint32_t> cells;
    for (uint32_t cell = 0; cell < other->share_slots(); cell++) cells.push_back(200 - cell);
    other->acquire(0, ring::CELLS, cells, 0);
    for (const ring::Grant& grant : grants(*other, cells.size())) {
        EXPECT_EQ(ClientSession::status(grant), ring::GRANTED);
    }
    EXPECT_TRUE(paused.closed());
}

TEST_F(RingTest, ClosesASessionThatKeepsMemoryFromAnotherModel) {
    FlashModel first(1, 801, "first");
    FlashModel second(1, 801, "second");
    const auto engine = serve(first, 100 + static_cast<uint32_t>(dram_for(second, 0) / 4096));
    EXPECT_EQ(engine->add_model(second.spec), 1U);
    Stranger paused(socket_path(), engine->open_session(0, 4).token);
    lease_all(paused);
    EXPECT_GE(engine->open_session(1, 2).share_slots, 2U);
    EXPECT_TRUE(paused.closed());
}

TEST_F(RingTest, AClosedSessionHearsOfItAndAttachesAgain) {
    FlashModel model(1, 801);
    const auto engine = serve(model, 100);
    const auto paused = attach(*engine, 4);
    std::vector<uint32_t> cells(paused->lease_limit());
    std::iota(cells.begin(), cells.end(), 0);
    paused->acquire(0, ring::CELLS, cells, 0);
    for (const ring::Grant& grant : grants(*paused, cells.size())) paused->address(grant, 4096);
    const auto other = attach(*engine, 40);
    std::iota(cells.begin(), cells.end(), 150);
    other->acquire(0, ring::CELLS, std::span(cells).first(other->share_slots()), 0);
    grants(*other, other->share_slots());  // it waited until weightd closed the first
    EXPECT_THROW(paused->require_alive(), flashclient::SessionLost);
    std::byte* resident = paused->resident().data();
    resident[5] = std::byte{77};
    const std::vector<std::byte> before(resident, resident + model.resident.size());
    paused->attach(socket_path(), engine->open_session(0, 4).token);
    EXPECT_EQ(paused->resident().data(), resident);
    EXPECT_EQ(std::memcmp(resident, before.data(), before.size()), 0);
    Sweep sweep(*paused, layout(model));
    expect_sweep(model, sweep, 1);
}

TEST_F(RingTest, ResidentWeightsOfAClosedSessionStayUntilItsClientLetsGo) {
    FlashModel first(1, 801, "first");
    FlashModel second(1, 801, "second");
    const auto engine = serve(first, 10);  // the resident weights of one have room
    EXPECT_EQ(engine->add_model(second.spec), 1U);
    auto client = std::make_unique<Stranger>(socket_path(), engine->open_session(0, 2).token);
    const void* resident = ::mmap(nullptr, first.resident.size(), PROT_READ, MAP_PRIVATE, client->fds[2], 0);
    client->post({99, ring::CELLS, 0, 1, 0, 0, {}});
    wait_until([&] { return client->closed() && engine->report().sessions == 0; });
    EXPECT_THROW(engine->open_session(1, 2), weightd::NoRoom);
    EXPECT_EQ(std::memcmp(resident, first.resident.data(), first.resident.size()), 0);
    client.reset();
    wait_until([&] {
        try {
            return engine->open_session(1, 2).share_slots > 0;
        } catch (const weightd::NoRoom&) {  // the daemon has not noticed yet
            return false;
        }
    });
}

TEST_F(RingTest, GivesClientsNoWayToWriteToWeights) {
    FlashModel model(1, 301);
    const auto engine = serve(model, 30);
    Stranger stranger(socket_path(), engine->open_session(0, 2).token);
    const int resident = stranger.fds[2];
    EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, resident, 0), MAP_FAILED);
    const std::string path = "/proc/self/fd/" + std::to_string(resident);
    const int again = ::open(path.c_str(), O_RDWR | O_CLOEXEC);  // root may open it, but the seal holds
    if (again >= 0) {
        EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, again, 0), MAP_FAILED);
        EXPECT_LT(::write(again, "x", 1), 0);
        ::close(again);
    }
    EXPECT_LT(::ftruncate(stranger.fds[0], 0), 0) << "a ring cut short would crash the daemon";
}

// A message that nobody reads could carry the connection itself, and so hold it open after the client has closed it.
TEST_F(RingTest, ClosesASessionThatSpeaksAfterItsHello) {
    FlashModel model(1, 301);
    const auto engine = serve(model, 30);
    {
        const Stranger stranger(socket_path(), engine->open_session(0, 2).token);
        EXPECT_TRUE(weightd::send_with_descriptors(stranger.socket, "x", 1, std::array{stranger.socket}));
    }
    wait_until([&] { return engine->report().sessions == 0; });
}

TEST_F(RingTest, IsNotBlockedByADoorbellWithoutONonblock) {
    FlashModel model(1, 301);
    const auto engine = serve(model, 30);
    Stranger stranger(socket_path(), engine->open_session(0, 2).token);
    ASSERT_EQ(::fcntl(stranger.fds[1], F_SETFL, 0), 0);
    const uint64_t full = UINT64_MAX - 2;
    ASSERT_EQ(::write(stranger.fds[1], &full, sizeof full), static_cast<ssize_t>(sizeof full));
    EXPECT_EQ(engine->report().sessions, 1U);
    const auto good = attach(*engine);
    good->acquire(0, ring::CELLS, std::array{1U}, 0);
    EXPECT_EQ(grants(*good, 1).size(), 1U);
}

}  // namespace
