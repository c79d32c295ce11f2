#include "session.h"

#include <linux/futex.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <system_error>
#include <utility>

namespace flashclient {
namespace {

constexpr double LIVENESS_CHECK_S = 0.1;  // a killed daemon wakes no futex: look at its socket this often
constexpr int SPINS = 200;                // about 5 us: a warm answer often comes within it

double now_s() {
    timespec time{};
    ::clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

[[noreturn]] void fail(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

struct Message {
    ssize_t bytes = 0;
    std::array<int, 4> descriptors{-1, -1, -1, -1};
};

Message receive(int socket, void* data, size_t bytes, int flags) {
    iovec part{data, bytes};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(4 * sizeof(int))> control{};
    msghdr header{};
    header.msg_iov = &part;
    header.msg_iovlen = 1;
    header.msg_control = control.data();
    header.msg_controllen = control.size();
    Message message;
    do {
        message.bytes = ::recvmsg(socket, &header, flags | MSG_CMSG_CLOEXEC);
    } while (message.bytes < 0 && errno == EINTR);
    if (message.bytes < 0) return message;
    for (cmsghdr* c = CMSG_FIRSTHDR(&header); c != nullptr; c = CMSG_NXTHDR(&header, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
        const size_t count = std::min<size_t>((c->cmsg_len - CMSG_LEN(0)) / sizeof(int), message.descriptors.size());
        std::memcpy(message.descriptors.data(), CMSG_DATA(c), count * sizeof(int));
    }
    return message;
}

std::byte* map(int fd, size_t bytes, int protection, int flags, const char* what) {
    void* mapped = ::mmap(nullptr, bytes, protection, flags, fd, 0);
    ::close(fd);
    if (mapped == MAP_FAILED) fail(what);
    return static_cast<std::byte*>(mapped);
}

}  // namespace

Session::Session(const std::string& data_socket, std::span<const uint8_t> token, double timeout_s)
    : owner_(::getpid()), timeout_s_(timeout_s) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (data_socket.size() >= sizeof address.sun_path || token.size() != ring::TOKEN_BYTES) {
        throw std::invalid_argument("a data socket's path has at most 107 bytes, a token 16");
    }
    std::memcpy(address.sun_path, data_socket.c_str(), data_socket.size() + 1);
    socket_ = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    try {
        if (socket_ < 0 || ::connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) {
            fail(data_socket);
        }
        greet(token);
    } catch (...) {
        close();
        throw;
    }
}

Session::~Session() {
    close();
    if (resident_ != nullptr) ::munmap(resident_, resident_bytes_);
    if (calibration_ != nullptr) ::munmap(calibration_, calibration_bytes_);
}

void Session::close() {
    for (const auto& [number, mapping] : segments_) ::munmap(mapping.data, mapping.bytes);
    segments_.clear();
    if (ring_ != nullptr) ::munmap(std::exchange(ring_, nullptr), sizeof(ring::Ring));
    if (doorbell_ >= 0) ::close(std::exchange(doorbell_, -1));
    if (socket_ >= 0) ::close(std::exchange(socket_, -1));
}

void Session::greet(std::span<const uint8_t> token) {
    ring::Hello hello{ring::MAGIC, ring::VERSION, {}};
    std::copy(token.begin(), token.end(), hello.token);
    if (::send(socket_, &hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello) fail("the data socket of weightd");
    pollfd readable{socket_, POLLIN, 0};
    const int ready = ::poll(&readable, 1, static_cast<int>(timeout_s_ * 1000));
    ring::Welcome welcome{};
    const Message message = ready > 0 ? receive(socket_, &welcome, sizeof welcome, 0) : Message{};
    if (message.bytes != sizeof welcome) throw SessionLost("weightd did not answer on its data socket");
    if (welcome.version != ring::VERSION || welcome.error == EPROTO) {
        throw SessionLost("weightd speaks another version of the ring: install the same version on both sides");
    }
    if (welcome.error != 0) {
        throw SessionLost(std::string("weightd refused the session: ") +
                          std::strerror(static_cast<int>(welcome.error)));
    }
    const auto [ring_fd, doorbell_fd, resident_fd, calibration_fd] = message.descriptors;
    doorbell_ = doorbell_fd;
    share_slots_ = welcome.share_slots;
    ring_ = reinterpret_cast<ring::Ring*>(
        map(ring_fd, sizeof(ring::Ring), PROT_READ | PROT_WRITE, MAP_SHARED, "mapping the ring"));
    // Private and writable: torch warns about read-only memory, and an in-place operation on it would crash.
    resident_ =
        map(resident_fd, welcome.resident_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, "mapping resident weights");
    resident_bytes_ = welcome.resident_bytes;
    if (welcome.calibration_bytes == 0) return;
    calibration_ = map(calibration_fd, welcome.calibration_bytes, PROT_READ, MAP_SHARED, "mapping predictors");
    calibration_bytes_ = welcome.calibration_bytes;
}

void Session::require_alive() const {
    if (ring_ == nullptr) throw SessionLost("the session was closed");
    if (::getpid() != owner_) throw WrongProcess("a session cannot be used after fork: open another one in the child");
    const uint32_t state = ring_->header.state.load(std::memory_order_acquire);
    if (state == ring::CLOSED_FOR_A_BROKEN_RULE) throw SessionLost("weightd closed the session for a broken rule");
    if (state != ring::OPEN) throw SessionLost("weightd closed the session: it was stopped");
}

uint32_t Session::lease_limit() const {
    require_alive();
    return ring_->header.lease_limit.load(std::memory_order_relaxed);
}

void Session::acquire(uint32_t layer, ring::Form form, std::span<const uint32_t> words, uint32_t tag) {
    post(ring::ACQUIRE, layer, form, words, tag);
}

void Session::release(uint32_t layer, ring::Form form, std::span<const uint32_t> words) {
    post(ring::RELEASE, layer, form, words, 0);
}

void Session::prefetch(uint32_t layer, ring::Form form, std::span<const uint32_t> words) {
    post(ring::PREFETCH, layer, form, words, 0);
}

void Session::post(ring::Op op, uint32_t layer, ring::Form form, std::span<const uint32_t> words, uint32_t tag) {
    require_alive();
    while (!words.empty()) {
        const auto part = words.first(std::min<size_t>(words.size(), ring::WORDS));
        words = words.subspan(part.size());
        wait_for_room();
        std::copy(part.begin(), part.end(), ring_->words[request_tail_ % ring::REQUESTS]);
        put({op, form, layer, static_cast<uint32_t>(part.size()), tag, 0, {}});
    }
    ring_doorbell();
}

void Session::exchange(uint32_t layer, std::span<const uint32_t> acquire, std::span<const uint32_t> release,
                       uint32_t tag) {
    require_alive();
    const size_t count = acquire.size() + release.size();
    if (count > ring::WORDS) throw std::invalid_argument("an exchange holds at most " + std::to_string(ring::WORDS));
    wait_for_room();
    uint32_t* words = ring_->words[request_tail_ % ring::REQUESTS];
    std::copy(release.begin(), release.end(), std::copy(acquire.begin(), acquire.end(), words));
    put({ring::ACQUIRE,
         ring::CELLS,
         layer,
         static_cast<uint32_t>(count),
         tag,
         static_cast<uint32_t>(release.size()),
         {}});
    ring_doorbell();
}

void Session::wait_for_room() {
    const double deadline_s = now_s() + timeout_s_;
    while (request_tail_ - ring_->header.request_head.load(std::memory_order_acquire) >= ring::REQUESTS) {
        ring_doorbell();
        ::sched_yield();
        require_alive();
        if (now_s() > deadline_s) throw SessionLost("weightd takes no requests");
    }
}

void Session::put(const ring::Request& request) {
    ring_->requests[request_tail_ % ring::REQUESTS] = request;
    ring_->header.request_tail.store(++request_tail_);  // before the look at daemon_sleeps, in everyone's eyes
}

void Session::ring_doorbell() {
    if (ring_->header.daemon_sleeps.load() == 0) return;
    const uint64_t one = 1;
    if (::write(doorbell_, &one, sizeof one) < 0 && errno != EAGAIN) fail("the doorbell of weightd");
}

bool Session::take_ready(std::vector<ring::Grant>& grants) {
    if (ring_ == nullptr) throw SessionLost("the session was closed");
    const uint32_t tail = ring_->header.grant_tail.load(std::memory_order_acquire);
    if (tail == grant_head_) return false;
    for (; grant_head_ != tail; grant_head_++) grants.push_back(ring_->grants[grant_head_ % ring::GRANTS]);
    ring_->header.grant_head.store(grant_head_, std::memory_order_release);
    return true;
}

void Session::take_grants(std::vector<ring::Grant>& grants, bool block) {
    if (take_ready(grants) || !block) return;
    const double deadline_s = now_s() + timeout_s_;
    for (int i = 0; i < SPINS; i++) {
        pause_briefly();
        if (take_ready(grants)) return;
    }
    while (true) {
        ring_->header.client_sleeps.store(1);
        const uint32_t seen = ring_->header.bell.load();
        const bool ready = take_ready(grants);
        if (!ready) {
            require_alive();
            wait_for_bell(seen, deadline_s);
        }
        ring_->header.client_sleeps.store(0);
        if (ready) return;
    }
}

void Session::wait_for_bell(uint32_t seen, double deadline_s) const {
    const timespec check{0, static_cast<long>(LIVENESS_CHECK_S * 1e9)};
    const long result = ::syscall(SYS_futex, &ring_->header.bell, FUTEX_WAIT, seen, &check, nullptr, 0);
    if (result == 0 || errno != ETIMEDOUT) return;
    char byte = 0;
    if (::recv(socket_, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0) throw SessionLost("weightd is gone");
    if (now_s() > deadline_s) throw SessionLost("weightd did not answer within " + std::to_string(timeout_s_) + " s");
}

const std::byte* Session::address(const ring::Grant& grant, uint32_t cell_bytes) {
    const uint32_t number = grant.segment & ring::SEGMENT_MASK;
    auto found = segments_.find(number);
    while (found == segments_.end()) {  // its news was sent before the grant
        if (!read_news(cell_bytes, static_cast<int>(timeout_s_ * 1000))) throw SessionLost("weightd sent no segment");
        found = segments_.find(number);
    }
    const size_t offset = size_t{grant.slot} * cell_bytes;
    if (offset + cell_bytes > found->second.bytes) throw SessionLost("weightd named a slot outside its segment");
    return found->second.data + offset;
}

bool Session::read_news(uint32_t cell_bytes, int timeout_ms) {
    pollfd readable{socket_, POLLIN, 0};
    if (::poll(&readable, 1, timeout_ms) <= 0) return false;
    ring::SegmentNews news{};
    const Message message = receive(socket_, &news, sizeof news, MSG_DONTWAIT);
    if (message.bytes != sizeof news) return false;
    if (news.slot_count > 0) {
        const size_t bytes = size_t{news.slot_count} * cell_bytes;
        segments_[news.segment] = {map(message.descriptors[0], bytes, PROT_READ, MAP_SHARED, "mapping a segment"),
                                   bytes};
    } else if (const auto found = segments_.find(news.segment); found != segments_.end()) {
        ::munmap(found->second.data, found->second.bytes);
        segments_.erase(found);
    }
    return true;
}

}  // namespace flashclient
