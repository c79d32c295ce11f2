// Functions that other threads pass to the engine's thread, which runs them.
#pragma once

#include <functional>
#include <future>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/direct_file.h"

namespace weightd {

struct Stopping : std::runtime_error {
    Stopping() : std::runtime_error("weightd is stopping") {}
};

class Commands {
  public:
    Commands();  // throws std::system_error

    // From any thread but the engine's: runs `function` there, waits, and returns or throws what it does. Throws
    // Stopping after stop().
    template <typename F>
    auto on_loop(F function) -> decltype(function()) {
        std::packaged_task<decltype(function())()> task(std::move(function));
        auto result = task.get_future();
        post([&task] { task(); });
        return result.get();
    }

    // From any thread.
    bool stop();  // false: the engine's thread cannot be told
    bool stopping() const;
    std::string failure() const;  // what fail() was told, or empty

    // On the engine's thread.
    void run();                          // what has been posted since the event was signalled
    void run_all();                      // what has been posted, signalled or not: no caller waits for ever
    void fail(const std::string& what);  // stops by a fault
    int event_fd() const { return event_.get(); }

  private:
    void post(std::function<void()> command);

    Descriptor event_;
    mutable std::mutex lock_;  // guards commands_, stopping_, failure_
    std::vector<std::function<void()>> commands_;
    bool stopping_ = false;
    std::string failure_;
};

}  // namespace weightd
