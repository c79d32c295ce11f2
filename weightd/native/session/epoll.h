// The descriptors that the engine's thread waits for, and what each of them is.
#pragma once

#include <sys/epoll.h>

#include <array>
#include <cstdint>
#include <span>

#include "device/direct_file.h"

namespace weightd {

enum class Watched : uint32_t { wake_only, command, listener, connection, session, pressure };

class Epoll {
  public:
    struct Event {
        Watched kind;
        uint32_t id;  // as watch() was told
        uint32_t events;
    };

    Epoll();  // throws std::system_error
    // `events` are those of epoll_ctl(2). Throws std::system_error.
    void watch(int fd, Watched kind, uint32_t id, uint32_t events);
    void change(int fd, Watched kind, uint32_t id, uint32_t events);
    void unwatch(int fd);  // does nothing for -1, or for what is not watched
    // Waits until something happens; -1: without a limit. The events are valid until the next call. Throws
    // std::system_error.
    std::span<const Event> wait(int timeout_ms);

  private:
    void control(int operation, int fd, Watched kind, uint32_t id, uint32_t events);

    Descriptor epoll_;
    std::array<Event, 64> events_{};  // of one wait(); more come with the next
};

}  // namespace weightd
