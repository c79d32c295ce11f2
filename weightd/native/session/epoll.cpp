#include "session/epoll.h"

#include "device/system_error.h"

namespace weightd {

Epoll::Epoll() : epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
    if (epoll_.get() < 0) fail("epoll");
}

void Epoll::control(int operation, int fd, Watched kind, uint32_t id, uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = uint64_t{static_cast<uint32_t>(kind)} << 32 | id;
    if (::epoll_ctl(epoll_.get(), operation, fd, &event) < 0) fail("epoll_ctl");
}

void Epoll::watch(int fd, Watched kind, uint32_t id, uint32_t events) { control(EPOLL_CTL_ADD, fd, kind, id, events); }

void Epoll::change(int fd, Watched kind, uint32_t id, uint32_t events) { control(EPOLL_CTL_MOD, fd, kind, id, events); }

void Epoll::unwatch(int fd) {
    if (fd >= 0) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

std::span<const Epoll::Event> Epoll::wait(int timeout_ms) {
    std::array<epoll_event, std::tuple_size_v<decltype(events_)>> ready;
    const int count = ::epoll_wait(epoll_.get(), ready.data(), static_cast<int>(ready.size()), timeout_ms);
    if (count < 0 && errno != EINTR) fail("epoll_wait");
    for (int i = 0; i < count; i++) {
        const uint64_t data = ready[i].data.u64;
        events_[i] = {static_cast<Watched>(data >> 32), static_cast<uint32_t>(data), ready[i].events};
    }
    return {events_.data(), count < 0 ? 0 : static_cast<size_t>(count)};
}

}  // namespace weightd
