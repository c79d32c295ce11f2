#include "ring/session.h"

#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <sstream>
#include <utility>
#include <vector>

#include "huge_pages.h"
#include "ring/system_error.h"

namespace flashclient {
namespace {

constexpr double WAIT_SLICE_S = 1.0;
constexpr size_t RENEWED_BYTES = 2U << 20;  // of resident weights, compared and mapped again at a time
constexpr int SPINS = 200;                  // about 5 us: a warm answer often comes within it

double now_s() {
    timespec time{};
    ::clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

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
    void* mapped = weightd::map_for_huge_pages(bytes, protection, flags, fd);
    ::close(fd);
    if (mapped == MAP_FAILED) fail(what);
    return static_cast<std::byte*>(mapped);
}

// Maps the parts of `fd` that are equal to `mapped` over it.
void renew(std::byte* mapped, size_t mapped_bytes, int fd, size_t bytes, int protection, int flags) {
    if (bytes != mapped_bytes) {
        ::close(fd);
        return;
    }
    const int kept = ::dup(fd);
    std::byte* fresh = map(fd, bytes, PROT_READ, MAP_SHARED, "mapping the weights of weightd again");
    bool done = true;
    for (size_t at = 0; at < bytes; at += RENEWED_BYTES) {
        const size_t size = std::min(RENEWED_BYTES, bytes - at);
        if (std::memcmp(mapped + at, fresh + at, size) != 0) continue;
        const auto offset = static_cast<off_t>(at);
        done = ::mmap(mapped + at, size, protection, flags | MAP_FIXED, kept, offset) != MAP_FAILED && done;
    }
    ::munmap(fresh, bytes);
    ::close(kept);
    if (!done) fail("mapping the weights of weightd again");
}

std::string seconds(double value_s) {
    std::ostringstream text;
    text << value_s << " s";
    return text.str();
}

}  // namespace

// All sessions of this process. A child after fork() closes what it has inherited of them, because weightd sees a
// session end when the last process closes its socket.
class ForkableSessions {
  public:
    static void enter(Session* session) {
        static const int once = ::pthread_atfork([] { lock.lock(); }, [] { lock.unlock(); }, abandon_in_child);
        static_cast<void>(once);
        const std::lock_guard guard(lock);
        all.push_back(session);
    }
    static void leave(Session* session) {
        const std::lock_guard guard(lock);
        std::erase(all, session);
    }

  private:
    static void abandon_in_child() {
        for (Session* session : all) session->abandon_in_child();
        all.clear();
        lock.unlock();
    }
    inline static std::mutex lock;
    inline static std::vector<Session*> all;
};

Session::Session(const std::string& data_socket, std::span<const uint8_t> token, double timeout_s)
    : owner_(::getpid()), timeout_s_(timeout_s) {
    attach(data_socket, token);
    ForkableSessions::enter(this);
}

std::unique_lock<std::mutex> Session::use() {
    if (::getpid() != owner_) throw WrongProcess("a session cannot be used after fork: open another one in the child");
    return std::unique_lock(in_use_);
}

void Session::attach(const std::string& data_socket, std::span<const uint8_t> token) {
    end();
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (data_socket.size() >= sizeof address.sun_path || token.size() != ring::TOKEN_BYTES) {
        throw std::invalid_argument("a data socket's path has at most 107 bytes, a token 16");
    }
    std::memcpy(address.sun_path, data_socket.c_str(), data_socket.size() + 1);
    {
        const std::lock_guard guard(ending_);
        if (closed_) throw SessionLost("the session was closed");
        socket_ = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    }
    try {
        if (socket_ < 0 || ::connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) {
            fail(data_socket);
        }
        greet(token);
        start_watching();
    } catch (...) {
        end();
        throw;
    }
}

Session::~Session() {
    ForkableSessions::leave(this);
    close();
    if (resident_ != nullptr) ::munmap(resident_, resident_bytes_);
    if (calibration_ != nullptr) ::munmap(calibration_, calibration_bytes_);
}

void Session::close() {
    if (::getpid() != owner_) return;
    {
        const std::lock_guard guard(ending_);
        closed_ = true;
        // The watcher notices it, and wakes a thread that waits for weightd.
        if (socket_ >= 0) ::shutdown(socket_, SHUT_RDWR);
    }
    const std::lock_guard use(in_use_);
    end();
}

void Session::end() {
    stop_watching();
    pool_.clear();
    counted_before_ = counters();
    if (ring_ != nullptr) ::munmap(std::exchange(ring_, nullptr), sizeof(ring::Ring));
    if (doorbell_ >= 0) ::close(std::exchange(doorbell_, -1));
    const std::lock_guard guard(ending_);
    if (socket_ >= 0) {
        // shutdown() also ends copies that a child inherited by a fork that bypassed our handler.
        ::shutdown(socket_, SHUT_RDWR);
        ::close(std::exchange(socket_, -1));
    }
    request_tail_ = grant_head_ = 0;
}

// Called in a child process. A thread that does not exist there may hold any lock. The memory is not inherited.
void Session::abandon_in_child() {
    ring_ = nullptr;
    for (int* descriptor : {&doorbell_, &socket_, &stop_event_}) {
        if (*descriptor >= 0) ::close(std::exchange(*descriptor, -1));
    }
    static_cast<void>(watcher_.release());  // the thread is the parent's
}

// ---- the thread that notices that weightd has ended ----

void Session::start_watching() {
    stop_event_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (stop_event_ < 0) fail("eventfd");
    sigset_t all;
    sigset_t before;
    ::sigfillset(&all);
    for (const int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL}) ::sigdelset(&all, fault);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);  // the user's threads handle signals
    try {
        watcher_ = std::make_unique<std::thread>([this] { watch(); });
    } catch (...) {
        ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Session::watch() {
    ::pthread_setname_np(::pthread_self(), "weightd-watch");
    pollfd watched[2] = {{socket_, POLLRDHUP, 0}, {stop_event_, POLLIN, 0}};
    while (::poll(watched, 2, -1) < 0 && errno == EINTR) continue;
    if (watched[0].revents == 0) return;
    pool_.revoke();
    ring_->header.bell.fetch_add(1);
    ::syscall(SYS_futex, &ring_->header.bell, FUTEX_WAKE, 1, nullptr, nullptr, 0);  // the one thread that waits
}

void Session::stop_watching() {
    if (watcher_ != nullptr) {
        ::eventfd_write(stop_event_, 1);
        watcher_->join();
        watcher_.reset();
    }
    if (stop_event_ >= 0) ::close(std::exchange(stop_event_, -1));
}

void Session::greet(std::span<const uint8_t> token) {
    ring::Hello hello{ring::MAGIC, ring::VERSION, {}};
    std::copy(token.begin(), token.end(), hello.token);
    if (::send(socket_, &hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello) fail("the data socket of weightd");
    pollfd readable{socket_, POLLIN, 0};
    const int ready = ::poll(&readable, 1, static_cast<int>(timeout_s_ * 1000));
    ring::Welcome welcome{};
    const Message message = ready > 0 ? receive(socket_, &welcome, sizeof welcome, 0) : Message{};
    if (ready == 0) throw NoAnswer("weightd did not answer on its data socket within " + seconds(timeout_s_));
    if (message.bytes != sizeof welcome) throw SessionLost("weightd hung up on its data socket");
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
    ::madvise(ring_, sizeof(ring::Ring), MADV_DONTFORK);  // a child may not use it
    take_resident(resident_fd, welcome.resident_bytes);
    if (welcome.calibration_bytes > 0) take_calibration(calibration_fd, welcome.calibration_bytes);
}

// Private and writable: torch warns about read-only memory, and an in-place operation on it would crash.
void Session::take_resident(int fd, size_t bytes) {
    constexpr int PROTECTION = PROT_READ | PROT_WRITE;
    if (bytes == 0) {  // of a table
        ::close(fd);
    } else if (resident_ == nullptr) {
        resident_ = map(fd, bytes, PROTECTION, MAP_PRIVATE, "mapping resident weights");
        resident_bytes_ = bytes;
    } else {
        renew(resident_, resident_bytes_, fd, bytes, PROTECTION, MAP_PRIVATE);
    }
}

void Session::take_calibration(int fd, size_t bytes) {
    if (calibration_ == nullptr) {
        calibration_ = map(fd, bytes, PROT_READ, MAP_SHARED, "mapping predictors");
        calibration_bytes_ = bytes;
    } else {
        renew(calibration_, calibration_bytes_, fd, bytes, PROT_READ, MAP_SHARED);
    }
}

void Session::require_alive() const {
    if (::getpid() != owner_) throw WrongProcess("a session cannot be used after fork: open another one in the child");
    if (ring_ == nullptr) throw SessionLost("the session was closed");
    std::atomic_thread_fence(std::memory_order_acquire);  // after all reads of the pool
    if (pool_.revoked()) throw SessionLost(gone());
    const uint32_t state = ring_->header.state.load(std::memory_order_acquire);
    if (state != ring::OPEN) throw SessionLost(gone());
}

std::string Session::gone() const {
    if (closed_) return "the session was closed";
    switch (ring_->header.state.load()) {
        case ring::OPEN:
            return "weightd is gone";
        case ring::CLOSED_BY_DAEMON:
            return "weightd was stopped";
        default:
            return "weightd closed the session, which kept others waiting or broke a rule";
    }
}

SessionCounters Session::counters() const {
    SessionCounters sum = counted_before_;
    if (ring_ == nullptr || ::getpid() != owner_) return sum;
    const ring::Header& header = ring_->header;
    sum.hits += header.hits.load(std::memory_order_relaxed);
    sum.misses += header.misses.load(std::memory_order_relaxed);
    sum.read_bytes += header.read_bytes.load(std::memory_order_relaxed);
    sum.prefetched += header.prefetched.load(std::memory_order_relaxed);
    sum.prefetched_used += header.prefetched_used.load(std::memory_order_relaxed);
    return sum;
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

void Session::prefetch(uint32_t layer, std::span<const uint32_t> ranges) {
    post(ring::PREFETCH, layer, ring::RANGES, ranges, ++hints_);
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
    const auto released = static_cast<uint32_t>(release.size());
    put({ring::ACQUIRE, ring::CELLS, layer, static_cast<uint32_t>(count), tag, released, {}});
    ring_doorbell();
}

void Session::wait_for_room() {
    double left_s = timeout_s_;
    while (request_tail_ - ring_->header.request_head.load(std::memory_order_acquire) >= ring::REQUESTS) {
        if (left_s <= 0) throw NoAnswer("weightd takes no requests");
        const double began_s = now_s();
        ring_doorbell();
        ::sched_yield();
        require_alive();
        left_s -= std::min(now_s() - began_s, WAIT_SLICE_S);  // as in wait_for_bell
    }
}

void Session::put(const ring::Request& request) {
    ring_->requests[request_tail_ % ring::REQUESTS] = request;
    ring_->header.request_tail.store(++request_tail_);  // before daemon_sleeps is read, for all threads
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
    // weightd takes back the pages of a closed ring after it has set the state: zeros would look like grants.
    std::atomic_thread_fence(std::memory_order_acquire);
    if (ring_->header.state.load(std::memory_order_acquire) != ring::OPEN) throw SessionLost(gone());
    ring_->header.grant_head.store(grant_head_, std::memory_order_release);
    return true;
}

void Session::take_grants(std::vector<ring::Grant>& grants, bool block) {
    if (take_ready(grants) || !block) return;
    double left_s = timeout_s_;
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
            left_s -= wait_for_bell(seen, left_s);
        }
        ring_->header.client_sleeps.store(0);
        if (ready) return;
    }
}

// Returns how much of `left_s` has passed, at most one slice: a process that was stopped for long must not conclude
// that weightd has not answered in time.
double Session::wait_for_bell(uint32_t seen, double left_s) const {
    if (left_s <= 0) throw NoAnswer("weightd did not answer within " + seconds(timeout_s_));
    const double began_s = now_s();
    const double slice_s = std::min(left_s, WAIT_SLICE_S);
    const auto whole_s = static_cast<time_t>(slice_s);
    const timespec slice{whole_s, static_cast<long>((slice_s - static_cast<double>(whole_s)) * 1e9)};
    ::syscall(SYS_futex, &ring_->header.bell, FUTEX_WAIT, seen, &slice, nullptr, 0);  // the watcher wakes it, too
    return std::min(now_s() - began_s, slice_s);
}

const std::byte* Session::address(const ring::Grant& grant, uint32_t cell_bytes) {
    const uint32_t number = grant.segment & ring::SEGMENT_MASK;
    const PoolMemory::Segment* segment = pool_.find(number);
    while (segment == nullptr) {  // its SegmentNews was sent before the grant
        if (!read_news(cell_bytes, static_cast<int>(timeout_s_ * 1000))) throw SessionLost("weightd sent no segment");
        segment = pool_.find(number);
    }
    const size_t offset = size_t{grant.slot} * cell_bytes;
    if (offset + cell_bytes > segment->bytes) throw SessionLost("weightd named a slot outside its segment");
    return segment->data + offset;
}

bool Session::read_news(uint32_t cell_bytes, int timeout_ms) {
    pollfd readable{socket_, POLLIN, 0};
    if (::poll(&readable, 1, timeout_ms) <= 0) return false;
    ring::SegmentNews news{};
    const Message message = receive(socket_, &news, sizeof news, MSG_DONTWAIT);
    if (message.bytes != sizeof news) return false;
    if (news.slot_count == 0) {
        pool_.unmap(news.segment);
    } else if (!pool_.map(news.segment, message.descriptors[0], size_t{news.slot_count} * cell_bytes)) {
        return false;
    }
    return true;
}

CorruptBundle::CorruptBundle(uint32_t layer, uint32_t position, const std::string& why)
    : std::runtime_error("layer " + std::to_string(layer) + ", neuron at position " + std::to_string(position) + " " +
                         why),
      layer(layer),
      position(position),
      why(why) {}

void raise_corrupt(uint32_t layer, const ring::Grant& grant, uint32_t bundles_per_cell) {
    const uint32_t first = grant.cell * bundles_per_cell;
    switch (Session::status(grant)) {
        case ring::UNREADABLE:
            throw CorruptBundle(layer, first,
                                "cannot be read: " + std::generic_category().message(static_cast<int>(grant.slot)) +
                                    "; look after the device, or import the model again");
        case ring::CORRUPT:
            throw CorruptBundle(layer, first + grant.slot, "differs from its checksum: import the model again");
        default:
            throw std::logic_error("layer " + std::to_string(layer) + ", cell " + std::to_string(grant.cell) +
                                   " is within the session's share and was refused");
    }
}

}  // namespace flashclient
