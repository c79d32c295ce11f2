// The daemon's end of one session, for tests: it opens the session and answers only what the test tells it to.
#pragma once

#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "ring.h"

namespace flashclient {

class SilentWeightd {
  public:
    SilentWeightd(const std::string& socket_path, uint32_t slots, uint32_t cell_bytes)
        : slots_(slots), segment_bytes_(size_t{slots} * cell_bytes) {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::memcpy(address.sun_path, socket_path.c_str(), socket_path.size() + 1);
        listening_ = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        EXPECT_EQ(::bind(listening_, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
        EXPECT_EQ(::listen(listening_, 1), 0);
        opener_ = std::thread([this] { open(); });
    }
    ~SilentWeightd() {
        join();
        ::close(listening_);
        ::close(connected_);
        ::munmap(ring_, sizeof(weightd::ring::Ring));
    }
    SilentWeightd(const SilentWeightd&) = delete;
    SilentWeightd& operator=(const SilentWeightd&) = delete;

    // Call it once the client is attached.
    void join() {
        if (opener_.joinable()) opener_.join();
    }

    struct Posted {
        weightd::ring::Request request;
        std::vector<uint32_t> words;
    };

    // Takes all requests that were posted since the last call.
    std::vector<Posted> take() {
        std::vector<Posted> posted;
        auto& head = ring_->header.request_head;
        for (; head.load() != ring_->header.request_tail.load(); head.fetch_add(1)) {
            const uint32_t slot = head.load() % weightd::ring::REQUESTS;
            const auto& request = ring_->requests[slot];
            posted.push_back({request, {ring_->words[slot], ring_->words[slot] + request.word_count}});
        }
        return posted;
    }

    // Grants cells; each gets the slot of its own number.
    void grant(std::span<const uint32_t> cells) {
        for (const uint32_t cell : cells) {
            const uint32_t tail = ring_->header.grant_tail.load();
            ring_->grants[tail % weightd::ring::GRANTS] = {0, cell, cell % slots_, 0};
            ring_->header.grant_tail.store(tail + 1);
        }
    }

  private:
    static int memory(size_t bytes) {
        const int fd = ::memfd_create("test", MFD_CLOEXEC);
        EXPECT_EQ(::ftruncate(fd, static_cast<off_t>(bytes)), 0);
        return fd;
    }

    template <size_t N>
    void send(const void* message, size_t bytes, const std::array<int, N>& descriptors) const {
        iovec part{const_cast<void*>(message), bytes};
        alignas(cmsghdr) std::array<char, CMSG_SPACE(N * sizeof(int))> control{};
        msghdr header{};
        header.msg_iov = &part;
        header.msg_iovlen = 1;
        header.msg_control = control.data();
        header.msg_controllen = control.size();
        cmsghdr* rights = CMSG_FIRSTHDR(&header);
        *rights = {CMSG_LEN(N * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        std::memcpy(CMSG_DATA(rights), descriptors.data(), N * sizeof(int));
        EXPECT_EQ(::sendmsg(connected_, &header, MSG_NOSIGNAL), static_cast<ssize_t>(bytes));
        for (const int descriptor : descriptors) ::close(descriptor);
    }

    void open() {
        connected_ = ::accept(listening_, nullptr, nullptr);
        weightd::ring::Hello hello{};
        EXPECT_EQ(::recv(connected_, &hello, sizeof hello, 0), static_cast<ssize_t>(sizeof hello));
        constexpr size_t RESIDENT_BYTES = 4096;
        const int ring = memory(sizeof(weightd::ring::Ring));
        void* mapped = ::mmap(nullptr, sizeof(weightd::ring::Ring), PROT_READ | PROT_WRITE, MAP_SHARED, ring, 0);
        ring_ = static_cast<weightd::ring::Ring*>(mapped);
        ring_->header.lease_limit.store(slots_);
        const weightd::ring::Welcome welcome{
            weightd::ring::MAGIC, weightd::ring::VERSION, RESIDENT_BYTES, 0, slots_, 0};
        send(&welcome, sizeof welcome, std::array{ring, ::eventfd(0, EFD_CLOEXEC), memory(RESIDENT_BYTES)});
        const weightd::ring::SegmentNews news{0, slots_};
        send(&news, sizeof news, std::array{memory(segment_bytes_)});
    }

    uint32_t slots_;
    size_t segment_bytes_;
    int listening_ = -1;
    int connected_ = -1;
    weightd::ring::Ring* ring_ = nullptr;
    std::thread opener_;
};

}  // namespace flashclient
