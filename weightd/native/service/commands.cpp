#include "service/commands.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include "device/system_error.h"

namespace weightd {

Commands::Commands() : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (event_.get() < 0) weightd::fail("eventfd");
}

void Commands::post(std::function<void()> command) {
    {
        const std::lock_guard guard(lock_);
        if (stopping_) throw Stopping();
        commands_.push_back(std::move(command));
    }
    if (::eventfd_write(event_.get(), 1) < 0) weightd::fail("eventfd");
}

bool Commands::stop() {
    {
        const std::lock_guard guard(lock_);
        stopping_ = true;
    }
    return ::eventfd_write(event_.get(), 1) == 0;
}

void Commands::fail(const std::string& what) {
    const std::lock_guard guard(lock_);
    stopping_ = true;
    failure_ = what;
}

bool Commands::stopping() const {
    const std::lock_guard guard(lock_);
    return stopping_;
}

std::string Commands::failure() const {
    const std::lock_guard guard(lock_);
    return failure_;
}

void Commands::run() {
    eventfd_t ignored = 0;
    if (::eventfd_read(event_.get(), &ignored) == 0) run_all();
}

void Commands::run_all() {
    std::vector<std::function<void()>> commands;
    {
        const std::lock_guard guard(lock_);
        commands.swap(commands_);
    }
    for (const auto& command : commands) command();
}

}  // namespace weightd
