// A daemon's service that outlives all inputs, a client of it that behaves, and a stranger that does not.
#pragma once

#include <fcntl.h>
#include <fuzzer/FuzzedDataProvider.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../native/flash_file.h"
#include "memory/model_cost.h"
#include "ring/session.h"
#include "service/engine_thread.h"

namespace weightd {

inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "broken: %s\n", what);
    std::abort();
}

class FuzzedDaemon {
  public:
    static FuzzedDaemon& get() {
        static auto* daemon = new FuzzedDaemon;  // its threads end with the process
        return *daemon;
    }

    Token open_session(uint32_t slots) { return engine_.open_session(model_number_, slots).token; }
    void step() { engine_.report(); }  // a whole turn of the loop has passed
    const std::string& socket() const { return socket_; }

    // The well-behaved session leases a cell, finds its bytes there, and gives it back.
    void expect_right_bytes(uint32_t number) {
        const uint32_t layer = number % 2;
        const uint32_t cell = number % model_.spec.layers[layer].cells;
        good_.acquire(layer, ring::CELLS, std::array{cell}, number);
        std::vector<ring::Grant> grants;
        while (grants.empty()) good_.take_grants(grants, true);
        require(grants.size() == 1 && grants[0].cell == cell && grants[0].tag == number,
                "one grant, for what was asked");
        require(flashclient::Session::status(grants[0]) == ring::GRANTED, "granted");
        const std::byte* found = good_.address(grants[0], model_.spec.cell_bytes);
        require(std::memcmp(found, model_.cell(layer, cell), model_.spec.cell_bytes) == 0, "the right bytes");
        good_.release(layer, ring::CELLS, std::array{cell});
    }

    // After strangers have disconnected, nothing of them is left.
    void expect_nothing_left() {
        const auto deadline = Clock::now() + std::chrono::seconds(60);
        while (true) {
            const Report report = engine_.report();
            if (report.sessions == 1 && report.models[0].slots_leased == 0) return;
            require(Clock::now() < deadline, "the leases of ended sessions are back");
            std::this_thread::yield();
        }
    }

  private:
    FuzzedDaemon() = default;

    static constexpr uint32_t SLOTS = 60;  // of 152 cells: there is eviction, and there are limits
    TestFolder folder_;
    FlashModel model_{2, 301};
    std::string socket_ = folder_.file("data");
    EngineThread engine_{{minimum_dram_bytes(model_.spec) + SLOTS * uint64_t{model_.spec.cell_bytes},
                          {"threads", 4, 16, false},
                          socket_}};
    uint32_t model_number_ = engine_.add_model(model_.spec);
    flashclient::Session good_{socket_, engine_.open_session(model_number_, 8).token, 60.0};
};

// A client's socket that sends any bytes.
class StrangeSocket {
  public:
    explicit StrangeSocket(const std::string& path) : fd_(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
        require(::connect(fd_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0, "a connection");
    }

    int get() const { return fd_.get(); }
    void close() { fd_.reset(); }
    void hang_up(int how) { ::shutdown(fd_.get(), how); }

    // With `count` descriptors, which the daemon never asked for.
    void send(std::span<const uint8_t> bytes, size_t count) {
        iovec part{const_cast<uint8_t*>(bytes.data()), bytes.size()};
        alignas(cmsghdr) std::array<char, CMSG_SPACE(16 * sizeof(int))> control{};
        const std::vector<int> descriptors(std::min<size_t>(count, 16), fd_.get());
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        if (!descriptors.empty()) {
            message.msg_control = control.data();
            message.msg_controllen = CMSG_SPACE(descriptors.size() * sizeof(int));
            cmsghdr* header = CMSG_FIRSTHDR(&message);
            header->cmsg_level = SOL_SOCKET;
            header->cmsg_type = SCM_RIGHTS;
            header->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
            std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size() * sizeof(int));
        }
        ::sendmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    }

    // The descriptors of the next message, if one comes; all of them are the caller's.
    std::vector<Descriptor> receive(void* data, size_t bytes, int timeout_ms) {
        pollfd readable{fd_.get(), POLLIN, 0};
        std::vector<Descriptor> received;
        if (::poll(&readable, 1, timeout_ms) <= 0) return received;
        iovec part{data, bytes};
        alignas(cmsghdr) std::array<char, CMSG_SPACE(4 * sizeof(int))> control{};
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control.data();
        message.msg_controllen = control.size();
        if (::recvmsg(fd_.get(), &message, MSG_CMSG_CLOEXEC) < 0) return received;
        const cmsghdr* header = CMSG_FIRSTHDR(&message);
        if (header == nullptr) return received;
        for (size_t i = 0; i < (header->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
            received.emplace_back(fd);
        }
        return received;
    }

  private:
    Descriptor fd_;
};

}  // namespace weightd
