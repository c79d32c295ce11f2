#include "session/ring_session.h"

#include <linux/futex.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <new>

#include "device/block_size.h"
#include "device/system_error.h"

namespace weightd {

namespace {

constexpr int PEER_PIDFD = 77;                     // SO_PEERPIDFD, which older headers lack
constexpr std::chrono::seconds BLOCKS_AT_MOST{5};  // a running client gives back at its next layer

}  // namespace

bool send_with_descriptors(int socket, const void* data, size_t bytes, std::span<const int> descriptors) {
    iovec part{const_cast<void*>(data), bytes};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(4 * sizeof(int))> control{};
    assert(descriptors.size() <= 4);
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (!descriptors.empty()) {
        message.msg_control = control.data();
        message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
        cmsghdr* header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(descriptors.size_bytes());
        std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size_bytes());
    }
    return ::sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
}

std::optional<ucred> peer_of(int socket) {
    ucred peer{};
    socklen_t bytes = sizeof peer;
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) < 0) return std::nullopt;
    return peer;
}

Descriptor process_of(int socket, const ucred& peer) {
    int process = -1;
    socklen_t bytes = sizeof process;
    if (::getsockopt(socket, SOL_SOCKET, PEER_PIDFD, &process, &bytes) == 0) return Descriptor(process);
    if (peer.pid <= 0) return Descriptor();
    return Descriptor(static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)));
}

RingSession::RingSession(uint32_t model, uint32_t cells, uint32_t share_slots, const Token& token, const User& user,
                         std::shared_ptr<const LoadedPredictors> predictors)
    : Session(model, cells, share_slots, true),
      token_(token),
      user_(user),
      predictors_(std::move(predictors)),
      memory_("weightd-ring", whole_pages(sizeof(ring::Ring))),
      doorbell_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (doorbell_.get() < 0) fail("eventfd");
    new (memory_.data()) ring::Ring;  // writes only the header: the other pages are zeros, and take no memory yet
    memory_.fix();
    ring().header.magic = ring::MAGIC;
    ring().header.version = ring::VERSION;
    ring().header.lease_limit.store(share_slots);
}

bool RingSession::attach(Descriptor socket, Descriptor process, const ucred& peer, uint64_t resident_bytes,
                         int resident_fd) {
    peer_ = peer;
    socket_ = std::move(socket);
    process_ = std::move(process);
    const bool predicts = predictors_ != nullptr;
    const uint64_t calibration_bytes = predicts ? predictors_->bytes : 0;
    const ring::Welcome welcome{ring::MAGIC, ring::VERSION, resident_bytes, calibration_bytes, share_slots, 0};
    std::vector<int> descriptors{memory_.shared_fd(), doorbell_.get(), resident_fd};
    if (predicts) descriptors.push_back(predictors_->memory.shared_fd());
    const bool sent = send_with_descriptors(socket_.get(), &welcome, sizeof welcome, descriptors);
    memory_.stop_sharing();
    return sent;
}

bool RingSession::has_requests() const {
    if (broken_) return false;
    // Sequentially consistent: must not be read before announce_sleep() has stored its flag.
    return !left_.empty() || ring().header.request_tail.load() != request_head_;
}

std::optional<RingSession::Taken> RingSession::take(uint32_t cells_max) {
    if (!has_requests()) return std::nullopt;
    std::span<const uint32_t> released;
    if (left_.empty()) {
        if (!take_request()) return std::nullopt;
        released = left_.last(request_.release_count);
        left_ = left_.first(left_.size() - request_.release_count);
    }
    const auto part = left_.first(std::min<size_t>(cells_max, left_.size()));
    left_ = left_.subspan(part.size());
    return Taken{static_cast<ring::Op>(request_.op), request_.layer, request_.tag, part, released};
}

bool RingSession::take_request() {
    const uint32_t waiting = ring().header.request_tail.load(std::memory_order_acquire) - request_head_;
    const uint32_t index = request_head_ % ring::REQUESTS;
    std::memcpy(&request_, &ring().requests[index], sizeof request_);
    if (waiting > ring::REQUESTS || !unpack(request_, index)) {
        broken_ = true;
        return false;
    }
    request_head_++;
    requests_++;
    ring().header.request_head.store(request_head_, std::memory_order_release);
    left_ = cells_;
    return true;
}

// Copies the words once and works on the copy: the client may change them at any moment.
bool RingSession::unpack(const ring::Request& request, uint32_t index) {
    if (request.op < ring::ACQUIRE || request.op > ring::PREFETCH || request.word_count > ring::WORDS) return false;
    const bool may_give_back = request.op == ring::ACQUIRE && request.form == ring::CELLS;
    if (request.release_count > (may_give_back ? request.word_count : 0)) return false;
    const uint32_t* words = ring().words[index];
    cells_.assign(words, words + request.word_count);
    if (request.form == ring::RANGES) {
        if (request.word_count % 2 != 0) return false;
        const std::vector<uint32_t> borders = std::move(cells_);
        cells_.clear();
        for (size_t i = 0; i < borders.size(); i += 2) {
            if (borders[i] > borders[i + 1] || borders[i + 1] - borders[i] > ring::GRANTS - cells_.size()) return false;
            for (uint32_t cell = borders[i]; cell < borders[i + 1]; cell++) cells_.push_back(cell);
        }
    } else if (request.form != ring::CELLS) {
        return false;
    }
    if (request.op != ring::ACQUIRE) return true;
    const uint32_t unread = grant_tail_ - ring().header.grant_head.load(std::memory_order_acquire);
    answers_owed_ += static_cast<uint32_t>(cells_.size()) - request.release_count;
    return unread <= ring::GRANTS && answers_owed_ <= ring::GRANTS - unread;
}

void RingSession::answer(const ring::Grant& grant) {
    assert(answers_owed_ > 0);
    answers_owed_--;
    ring().grants[grant_tail_++ % ring::GRANTS] = grant;
}

void RingSession::granted(uint32_t tag, uint32_t cell, Place place, const Pool&) {
    if (broken_) return;
    const uint32_t number = place.segment->number;
    assert(number <= ring::SEGMENT_MASK);
    if (number != last_segment_ && segments_known_.insert(number).second) {
        const ring::SegmentNews news{number, static_cast<uint32_t>(place.segment->slots.size())};
        const std::array descriptors{place.segment->memory.shared_fd()};
        // Fails if the socket is full: the client does not read it.
        broken_ = !send_with_descriptors(socket_.get(), &news, sizeof news, descriptors);
    }
    last_segment_ = number;
    answer({tag, cell, place.index, number});
}

void RingSession::failed(uint32_t tag, uint32_t cell, ring::Status status, uint32_t detail) {
    if (!broken_) answer({tag, cell, detail, status << ring::STATUS_SHIFT});
}

void RingSession::segment_gone(uint32_t segment) {
    if (last_segment_ == segment) last_segment_ = ring::SEGMENT_MASK + 1;
    if (segments_known_.erase(segment) == 0) return;
    const ring::SegmentNews news{segment, 0};
    broken_ = !send_with_descriptors(socket_.get(), &news, sizeof news, {}) || broken_;
}

void RingSession::limit_changed(uint32_t obey) { ring().header.lease_limit.store(obey); }

bool RingSession::blocks_for_long(bool blocks) {
    if (!blocks) blocks_since_.reset();
    if (blocks && !blocks_since_) blocks_since_ = Clock::now();
    return blocks && Clock::now() - *blocks_since_ > BLOCKS_AT_MOST;
}

void RingSession::flush() {
    ring::Header& header = ring().header;
    header.hits.store(hits, std::memory_order_relaxed);
    header.misses.store(misses, std::memory_order_relaxed);
    header.read_bytes.store(read_bytes, std::memory_order_relaxed);
    header.prefetched.store(prefetched, std::memory_order_relaxed);
    header.prefetched_used.store(prefetched_used, std::memory_order_relaxed);
    header.grant_tail.store(grant_tail_, std::memory_order_release);
    wake();
}

void RingSession::wake() {
    ring::Header& header = ring().header;
    header.bell.fetch_add(1);
    if (header.client_sleeps.load() == 0) return;
    // Wakes one thread. A client waits in one thread at a time; waking many threads would delay other clients.
    ::syscall(SYS_futex, &header.bell, FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

void RingSession::announce_sleep(bool sleeps) { ring().header.daemon_sleeps.store(sleeps ? 1 : 0); }

EndedSession RingSession::end() {
    if (attached()) ::shutdown(socket_.get(), SHUT_WR);
    memory_.abandon(sizeof(ring::Header));  // the header stays: it has the state, which is read after the end
    return {model, user_, std::move(memory_), std::move(socket_), std::move(process_), std::move(predictors_)};
}

void RingSession::close(ring::State state) {
    ring().header.state.store(state);
    ring().header.client_sleeps.store(1);  // wakes the futex whatever the client has stored there
    wake();
}

}  // namespace weightd
